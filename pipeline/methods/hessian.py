"""The Hessian of a layer's squared output error: H = X^T X over all calibration tokens, and its factors.

GPTQ (arXiv 2210.17323, section 3.1) minimizes ||(W - W') X||^2 row by row; 2 H is the second derivative of that.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitpress.kernels.activations.base import finite_rows

DAMPING_CAP = 1.0  # of the mean diagonal: beyond it hardly anything of the Hessian is left
_PANEL = 256  # columns that are multiplied at a time; what lies below the diagonal is not computed
_INVERTED = 1024  # columns of a factor that are inverted at a time


@contextlib.contextmanager
def bfloat16_products(dtypes: Iterable[torch.dtype]) -> Iterator[None]:
    """Lets a CPU multiply float32 matrices as bfloat16 with float32 sums, if all inputs to be added are bfloat16.

    Products of two bfloat16 numbers are exact in float32, so nothing is lost, and processors with matrix units gain.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if all(dtype == torch.bfloat16 for dtype in dtypes):
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@dataclass(frozen=True)
class Factor:
    """The upper Cholesky factor of the inverse of a damped Hessian, its columns in the order given.

    order: int64 [in]; upper: float32 [in, in] with (H[order][:, order] + damping * I)^-1 = upper^T upper.
    damping: what was added to the diagonal, as a fraction of its mean.
    """

    order: Tensor
    upper: Tensor
    damping: float


class Hessian:
    """X^T X of a linear layer's inputs, float32 [in, in], summed in the order in which they come.

    tokens: rows that were summed. dropped: rows left out because they were not finite.
    """

    multiplies_inputs = True
    by_gradient = False

    def __init__(self, in_features: int, device: torch.device):
        self.tokens = 0
        self.dropped = 0
        self._sum = torch.zeros(in_features, in_features, device=device)  # on and above the diagonal only, until asked
        self._dead: Tensor | None = None
        self._factors: dict[tuple[float, bool], Factor | None] = {}

    @staticmethod
    def nbytes(in_features: int) -> int:
        return 4 * in_features**2

    def add(self, inputs: Tensor) -> None:
        """Sum inputs [..., in], floating. Rows with NaN or infinite values are left out, and counted."""
        assert self._dead is None, "a Hessian that was used takes no more inputs"
        rows, dropped = finite_rows(inputs)
        self.dropped += dropped
        self.tokens += rows.shape[0]
        halves = rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16)  # tensor cores take them as they are
        wide = rows if halves else rows.to(torch.float32)
        for start in range(0, wide.shape[1], _PANEL):
            panel, total = wide[:, start : start + _PANEL], self._sum[start : start + _PANEL, start:]
            if halves:
                total.add_(torch.mm(panel.t(), wide[:, start:], out_dtype=torch.float32))
            else:
                total.addmm_(panel.t(), wide[:, start:])

    def state_dict(self) -> dict[str, Tensor]:
        assert self._dead is None, "a Hessian that was used is no sum any more"
        panels = [self._sum[start : start + _PANEL, start:].reshape(-1) for start in range(0, len(self._sum), _PANEL)]
        return {"sum": torch.cat(panels), "counts": torch.tensor([self.tokens, self.dropped])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.tokens, self.dropped = state["counts"].tolist()
        flat, size = state["sum"], len(self._sum)
        for start in range(0, size, _PANEL):
            panel = self._sum[start : start + _PANEL, start:]
            panel.copy_(flat[: panel.numel()].view_as(panel))
            flat = flat[panel.numel() :]

    def divided(self, scale: Tensor) -> "Hessian":
        """The Hessian of the same inputs divided by `scale`, float32 [in], powers of two: exactly."""
        assert self._dead is None, "a Hessian that was used is no sum any more"
        other = type(self)(len(scale), self._sum.device)
        other.tokens, other.dropped = self.tokens, self.dropped
        torch.div(self._sum, scale, out=other._sum).div_(scale.unsqueeze(1))
        return other

    def matrix(self) -> Tensor:
        """X^T X, float32 [in, in], symmetric; dead columns (inputs that were always 0) have the mean on the diagonal.

        So the rounding errors of a dead column and those of others do not reach each other.
        """
        if self._dead is None:
            matrix, size = self._sum, self._sum.shape[0]
            for start in range(0, size, _PANEL):
                end = start + _PANEL
                matrix[end:, start:end] = matrix[start:end, end:].t()
                corner = matrix[start:end, start:end]
                corner.copy_(corner.triu() + corner.triu(1).t())
            diagonal = matrix.diagonal()
            self._dead = diagonal == 0
            diagonal[self._dead] = diagonal.mean()
        return self._sum

    def dead(self) -> Tensor:
        """The inputs that were always 0, bool [in]."""
        self.matrix()
        assert self._dead is not None
        return self._dead

    def factor(self, damping: float, act_order: bool) -> Factor | None:
        """The factor at the least damping that works: `damping`, then ten times as much, up to DAMPING_CAP; at each,
        float32 and then float64 is tried. None if none works, or no input was ever anything but 0.

        Args:
            damping: as a fraction of the mean of the diagonal.
            act_order: columns by descending diagonal (GPTQ's "act-order"), or as they are.
        """
        key = (damping, act_order)
        if key in self._factors:
            return self._factors[key]
        self._factors[key] = None
        matrix = self.matrix()
        diagonal = matrix.diagonal()
        if not torch.isfinite(diagonal).all() or self.dead().all():
            return None
        order = torch.arange(matrix.shape[0], device=matrix.device)
        if act_order:
            order = diagonal.argsort(descending=True, stable=True)
        mean = diagonal.mean().item()
        while damping <= DAMPING_CAP:
            for dtype in (torch.float32, torch.float64):
                upper = _inverse_factor(matrix, order, damping * mean, dtype)
                if upper is not None:
                    self._factors[key] = Factor(order, upper, damping)
                    return self._factors[key]
            damping *= 10
        return None


class GradientHessian(Hessian):
    """The same of inputs that are weighted by token: sum over tokens t of |g_t|^2 x_t x_t^T, where g_t is the gradient
    of the block's output by the layer's output for the token. See GuidedQuant (arXiv 2505.07004, equation 7), whose
    gradient is that of the model's loss.
    """

    by_gradient = True


def _inverse_factor(matrix: Tensor, order: Tensor, added: float, dtype: torch.dtype) -> Tensor | None:
    """U, upper triangular float32, with M^-1 = U^T U for M = matrix[order][:, order] + added * I; None if M is not
    positive definite.

    The Cholesky factor of M flipped in both directions gives it: from J M J = L L^T follows M = (J L J)(J L J)^T with
    J L J upper triangular, and U is the inverse of that. So one factorization and one triangular inverse are enough.
    """
    flipped = order.flip(0)
    damped = matrix[flipped][:, flipped].to(dtype)
    damped.diagonal().add_(added)
    lower, info = torch.linalg.cholesky_ex(damped)
    del damped
    if int(info) or not torch.isfinite(lower.diagonal()).all():
        return None
    size = lower.shape[0]
    upper = torch.zeros(size, size, device=matrix.device)
    for start in range(0, size, _INVERTED):  # panel by panel: a whole identity and a whole inverse would be two more
        rest = size - start
        identity = torch.eye(rest, min(_INVERTED, rest), dtype=dtype, device=matrix.device)
        columns = torch.linalg.solve_triangular(lower[start:, start:], identity, upper=False)
        upper[:rest, max(0, rest - _INVERTED) : rest] = columns.flip(0, 1).to(torch.float32)
    return upper if torch.isfinite(upper).all() else None
