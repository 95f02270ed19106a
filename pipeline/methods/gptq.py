"""GPTQ (arXiv 2210.17323): columns are rounded one by one, and the columns still to come make up for each error.

Three things are added to the paper's algorithm:
- Columns go by descending activation, but groups lie as they do in the file, so no runtime needs a g_idx.
- Scales are searched. A first round takes absmax's scales; the search then looks at what that round really rounded,
  the weight with the compensations of earlier columns. Each group gets the scale with the least squared error among
  shrunken ranges. The error of column j counts 1 / U_jj^2 (U: the Cholesky factor of the inverse Hessian): that is what
  is left of it after all later columns have made up for it as well as they can. The columns are then rounded again
  (`rounds`), and each row keeps its best round.
- Coordinate descent (`passes`) then goes over scales and codes and sets each to its best value with all others fixed.
"""

import dataclasses
import math
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from bitpress.kernels.cpu import gptq_columns as native_columns
from bitpress.kernels.products import add_product, product
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme
from bitpress.kernels.triton import gptq_columns as triton_columns
from bitpress.kernels.weights.grid import CodeGrid, grid_of

from ..system.threads import map_threads
from .absmax import Absmax
from .base import Diagnostics, Method, Statistic
from .hessian import Factor, GradientHessian, Hessian

_BLOCK = 128  # columns whose compensations reach all later ones by one matrix product
_ROWS = (1024, 2048)  # that a thread works on: fewer would wait for the interpreter, more for the memory
_CUDA_WEIGHTS = 1 << 26  # worked on at a time: with all that is kept beside them, 2 to 3 GB


@dataclass(frozen=True, config=ConfigDict(strict=True))
class GPTQ(Method):
    """The method and its options.

    damping: added to the Hessian's diagonal, as a fraction of its mean; raised tenfold where it is not enough.
    act_order: columns go by descending activation, else as they lie.
    rounds: how often columns are rounded: first with absmax's scales, then with scales searched on what was rounded.
    passes: of coordinate descent over scales and codes afterwards.
    true_sequential: within a block, each layer is calibrated on inputs that the quantized layers before it gave.
    by_gradient: a token counts in a layer's Hessian by how much an error of the layer's output for it moves what the
        block puts out; else all tokens count the same. It takes half as long again: a backward pass through each block.
    """

    damping: Annotated[float, Field(gt=0, le=1)] = 1e-4
    act_order: bool = True
    rounds: Annotated[int, Field(ge=1, le=10)] = 2
    passes: Annotated[int, Field(ge=0, le=10)] = 1
    true_sequential: bool = False
    by_gradient: bool = True

    name: ClassVar[str] = "gptq"
    rank: ClassVar[int] = 30
    version: ClassVar[int] = 1

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        return (GradientHessian if self.by_gradient else Hessian,)

    def problems(self, scheme: Scheme) -> list[str]:
        fits = grid_of(scheme.weight) is not None
        what = f"{self.name} produces weights that have a scale per channel or group"
        return [] if fits else [f"{what}, not {scheme.name}"]

    def divided(self, statistics: tuple[Any, ...], scale: Tensor) -> tuple[Any, ...]:
        (hessian,) = statistics
        return (hessian.divided(scale),)

    def quantize(
        self, weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, statistics: tuple[Any, ...] = ()
    ) -> tuple[QTensor, Diagnostics]:
        (hessian,) = statistics
        factor = hessian.factor(self.damping, self.act_order)
        if factor is None:
            qtensor, diagnostics = Absmax().quantize(weight, scheme, scale_dtype)
            reason = "its inputs were always 0" if hessian.dead().all() else "its Hessian is not positive definite"
            return qtensor, Diagnostics(diagnostics.relative_error, tokens=hessian.tokens, fallback=reason)
        make = grid_of(scheme.weight)
        assert make is not None, "problems() refuses types without a grid"
        solver = _Solver(make(weight, scale_dtype), scheme.weight.description().group_size, hessian, factor, self)
        if weight.is_cuda:
            chunks = [solver.solve(rows) for rows in weight.split(max(1, _CUDA_WEIGHTS // weight.shape[1]))]
        else:
            share = -(-weight.shape[0] // torch.get_num_threads())
            chunks = map_threads(solver.solve, weight.split(min(max(share, _ROWS[0]), _ROWS[1])))
        parts, sums = zip(*chunks)
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        qtensor = QTensor.of(scheme, (weight.shape[0], weight.shape[1]), {**tensors, **solver.kind.common})
        lost, norm, output_lost, output_norm = (math.fsum(column) for column in zip(*sums))
        return qtensor, Diagnostics(
            math.sqrt(lost / norm) if norm else 0.0,
            output_error=math.sqrt(max(output_lost, 0.0) / output_norm) if output_norm else 0.0,
            tokens=hessian.tokens,
            damping=factor.damping,
        )


@dataclasses.dataclass(frozen=True)
class _Grid:
    """The values that weights may take, for G groups of R rows.

    scales: float32 [G, R], as they can be stored. zeros: uint8 [G, R] or None.
    low, high: the least and the largest centred code, float32 [G, R].
    """

    scales: Tensor
    zeros: Tensor | None
    low: Tensor
    high: Tensor

    def where(self, chosen: Tensor, other: "_Grid") -> "_Grid":
        """The other grid in the rows that are chosen, bool [R]; this one in the others."""
        zeros = None if self.zeros is None or other.zeros is None else torch.where(chosen, other.zeros, self.zeros)
        pairs = ((self.scales, other.scales), (self.low, other.low), (self.high, other.high))
        scales, low, high = (torch.where(chosen, new, old) for old, new in pairs)
        return _Grid(scales, zeros, low, high)


class _Solver:
    """Quantizes one layer. Rows do not depend on each other. They are solved transposed, so a column is contiguous.

    Shapes below: K inputs, R rows of the weight at a time, G groups of g inputs. Codes are centred and float32.
    """

    def __init__(self, kind: CodeGrid, group_size: int | None, hessian: Hessian, factor: Factor, options: GPTQ):
        self.kind, self.options = kind, options
        self.matrix, self.dead, self.factor = hessian.matrix(), hessian.dead(), factor
        self.groups = len(self.matrix) // (group_size or len(self.matrix))
        self.group_size = len(self.matrix) // self.groups
        self.group_of = (factor.order // self.group_size).to(torch.int32)
        self.inverse = factor.order.argsort()
        importance = factor.upper.diagonal().pow(-2)[self.inverse]
        self.importance = (importance / importance.mean()).view(self.groups, self.group_size, 1)
        self.added = factor.damping * self.matrix.diagonal().mean().item()

    def solve(self, rows: Tensor) -> tuple[dict[str, Tensor], tuple[float, float, float, float]]:
        """Quantize rows [R, K] of the weight.

        Returns the tensors of these rows, and the sums of squares of the weight's error, the weight, the output's error
        and the output.
        """
        weight = rows.to(torch.float32).t().contiguous()
        pinned = (self.grouped(weight) == 0).all(1)  # groups of zeros stay zeros
        grid = self.search(weight, pinned, self.kind.ratios[:1])
        codes, target, loss = self.round(weight, grid)
        for _ in range(self.options.rounds - 1):
            other = self.search(target, pinned, self.kind.ratios)
            others, target, its_loss = self.round(weight, other)
            better = its_loss < loss
            codes, loss = torch.where(better, others, codes), torch.where(better, its_loss, loss)
            grid = grid.where(better, other)
        for _ in range(self.options.passes):
            codes, grid = self.descend(weight, codes, grid)
        error = weight - self.values(codes, grid)
        sums = [error.pow(2).sum().item(), weight.pow(2).sum().item()]
        for part in (error, weight):
            part = part.masked_fill(self.dead.unsqueeze(1), 0)
            sums.append(product(self.matrix, part).mul_(part).sum().item())
        zeros = None if grid.zeros is None else grid.zeros.t()
        tensors = self.kind.pack(codes.t(), grid.scales.t().contiguous(), zeros)
        return tensors, (sums[0], sums[1], sums[2], sums[3])

    def grouped(self, columns: Tensor) -> Tensor:
        """[K, R] as [G, g, R]."""
        return columns.view(self.groups, self.group_size, -1)

    def values(self, codes: Tensor, grid: _Grid) -> Tensor:
        """What codes [K, R] stand for."""
        return (self.grouped(codes) * grid.scales.unsqueeze(1)).view_as(codes)

    def grid(self, scales: Tensor, zeros: Tensor | None) -> _Grid:
        """The grid of scales [..., R] and zero points of that shape."""
        return _Grid(scales, zeros, *self.kind.limits(scales, zeros))

    def search(self, target: Tensor, pinned: Tensor, ratios: tuple[float, ...]) -> _Grid:
        """The grid, among those of these ratios of each group's range, with the least squared error, by importance, of
        target [K, R]; pinned groups [G, R] hold nothing but 0."""
        scales: list[Tensor] = []
        zeros: list[Tensor] = []
        for group, importance in zip(self.grouped(target), self.importance):  # [g, R], [g, 1]
            reach = torch.stack([group.amin(0), group.amax(0)], -1)
            best_scale, best_zero = self.kind.parameters(reach)
            least = torch.full_like(reach[:, 0], math.inf)
            for ratio in ratios:
                scale, zero = self.kind.parameters(reach * ratio)
                grid = self.grid(scale, zero)
                codes = self.kind.nearest(torch.div(group, grid.scales)).clamp_(grid.low, grid.high)
                error = codes.mul_(grid.scales).sub_(group).square_().mul_(importance).sum(0)
                better = error < least
                least = torch.where(better, error, least)
                best_scale = torch.where(better, scale, best_scale)
                if zero is not None and best_zero is not None:
                    best_zero = torch.where(better, zero, best_zero)
            scales.append(best_scale)
            zeros += [] if best_zero is None else [best_zero]
        grid = self.grid(
            torch.stack(scales).masked_fill_(pinned, 1),
            torch.stack(zeros).masked_fill_(pinned, 0) if zeros else None,
        )
        return replace(grid, low=grid.low.masked_fill(pinned, 0), high=grid.high.masked_fill(pinned, 0))

    def round(self, weight: Tensor, grid: _Grid) -> tuple[Tensor, Tensor, Tensor]:
        """GPTQ proper (arXiv 2210.17323, Algorithm 1) on weight [K, R].

        Returns codes [K, R], what was rounded (the weight with the compensations), and the loss of each row [R],
        ||(W - W') X||^2 with the damping.
        """
        upper, left = self.factor.upper, weight[self.factor.order]
        codes, errors = torch.empty_like(left), torch.empty(min(_BLOCK, len(left)), left.shape[1], device=left.device)
        loss = torch.zeros_like(left[0])
        for start in range(0, len(left), _BLOCK):
            end = min(start + _BLOCK, len(left))
            self.round_block(slice(start, end), left, grid, codes, errors)
            loss += errors[: end - start].square().sum(0)
            add_product(left[end:], upper[start:end, end:].t(), errors[: end - start], alpha=-1)
        return codes[self.inverse], left[self.inverse], loss

    def round_block(self, part: slice, left: Tensor, grid: _Grid, codes: Tensor, errors: Tensor) -> None:
        """Round these columns of left [K, R], one after the other, each with the compensations of those before it:
        the inner loop of Algorithm 1. Sets codes [K, R], and errors [columns, R] to each error over its U_jj."""
        upper, start, end = self.factor.upper, part.start, part.stop
        if self.kind.whole and (loop := _loop(left.device)):
            tables = (grid.scales, grid.low, grid.high)
            block, groups = upper[part, part], self.group_of[part]
            loop.round_columns(left[part], block, tables, groups, codes[part], errors[: end - start])
            return
        pivots = upper[part, part].diagonal().unsqueeze(1)
        unit, errors, groups = upper[part, part] / pivots, errors[: end - start], self.group_of[part]
        operands = (
            left[part],
            codes[part],
            errors,
            unit,
            *(each[groups] for each in (grid.scales, grid.low, grid.high)),
        )
        columns = zip(*(each.unbind(0) for each in operands))  # one call each: views cost as much as the arithmetic
        for j, (column, code, error, row, scale, low, high) in enumerate(columns, 1):
            self.kind.nearest(torch.div(column, scale, out=code)).clamp_(low, high)
            torch.addcmul(column, code, scale, value=-1, out=error)
            left[start + j : end].addr_(row[j:], error, alpha=-1)
        errors.div_(pivots)

    def descend(self, weight: Tensor, codes: Tensor, grid: _Grid) -> tuple[Tensor, _Grid]:
        """One pass of coordinate descent on ||(W - W') X||^2, a quadratic in the scales and in the codes.

        Each group's scale, then each of its codes, is set to its best value with all others fixed. Zero points stay.
        """
        error = weight - self.values(codes, grid)
        slope = add_product(error * self.added, self.matrix, error)  # minus half the gradient of the loss
        fitted = []
        for group, start in enumerate(range(0, len(weight), self.group_size)):
            part = slice(start, start + self.group_size)
            inner = self.matrix[part, part].clone()
            inner.diagonal().add_(self.added)
            before = codes[part] * grid.scales[group]
            scale = self.refit(codes[part], slope[part], inner, grid.scales[group])
            moved = (scale - grid.scales[group]) * codes[part]
            local = add_product(slope[part].clone(), inner, moved, alpha=-1)
            limits = (grid.low[group], grid.high[group])
            _settle(self.kind, codes[part], local, inner, scale, limits)
            change = codes[part] * scale - before
            add_product(slope, self.matrix[:, part], change, alpha=-1)
            slope[part].sub_(change, alpha=self.added)
            fitted.append(scale)
        return codes, replace(grid, scales=torch.stack(fitted))

    def refit(self, codes: Tensor, slope: Tensor, inner: Tensor, scale: Tensor) -> Tensor:
        """The best scale [R] of a group for its codes [g, R], rounded to what is stored; the old one if no better."""
        rise = (codes * slope).sum(0)
        bend = (codes * product(inner, codes)).sum(0)
        fitted = self.kind.representable(scale + rise / bend)
        step = fitted - scale
        better = (fitted > 0) & torch.isfinite(fitted) & (step * (2 * rise - step * bend) > 0)
        return torch.where(better, fitted, scale)


def _loop(device: torch.device) -> Any:
    """What goes over columns at once on this device; None where torch does, one operation after the other."""
    return next((each for each in (triton_columns, native_columns) if each.problem(device) is None), None)


def _settle(
    kind: CodeGrid, codes: Tensor, slope: Tensor, inner: Tensor, scale: Tensor, limits: tuple[Tensor, Tensor]
) -> None:
    """Set the codes [g, R] of a group in place, one after the other, each to the best one for its slope [g, R].

    slope: minus half the gradient of the loss. inner: the group's part of the damped Hessian [g, g]. scale: [R].
    limits: the least and the largest centred code [R].
    """
    for start in range(0, len(codes), _BLOCK):
        end = min(start + _BLOCK, len(codes))
        changes = torch.empty_like(codes[start:end])
        _settle_block(kind, slice(start, end), codes, slope, inner, (scale, *limits), changes)
        add_product(slope[end:], inner[end:, start:end], changes, alpha=-1)


def _settle_block(
    kind: CodeGrid,
    part: slice,
    codes: Tensor,
    slope: Tensor,
    inner: Tensor,
    grid: tuple[Tensor, Tensor, Tensor],
    changes: Tensor,
) -> None:
    """Do the same for these columns alone; changes [columns, R] is set to how their values change."""
    start, end = part.start, part.stop
    if kind.whole and (loop := _loop(codes.device)):
        scale, low, high = (each.unsqueeze(0) for each in grid)
        groups = torch.zeros(end - start, dtype=torch.int32, device=codes.device)
        loop.settle_columns(slope[part], inner[part, part], (scale, low, high), groups, codes[part], changes)
        return
    scale, *limits = grid
    pivots = inner[part, part].diagonal().tolist()
    columns = zip(pivots, *(each.unbind(0) for each in (codes[part], slope[part], inner[part, part], changes)))
    for j, (pivot, code, rise, row, change) in enumerate(columns, 1):
        better = kind.nearest(torch.addcdiv(code, rise, scale, value=1 / pivot)).clamp_(*limits)
        torch.sub(better, code, out=change).mul_(scale)
        code.copy_(better)
        slope[start + j : end].addr_(row[j:], change, alpha=-1)


PLUGINS = (GPTQ(),)
