"""The search that transforms by scales share: which scale of a group's inputs makes its outputs best when quantized.

A layer's output X W^T is also (X / s) (W s)^T for any scale s of the input channels. The inverse of s moves into
whatever makes X: a norm, or the layer before. All scales are powers of two. So no number is rounded on the way, in
whatever dtype it lies, and the transformed block computes the same bits as before.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from bitpress.kernels.activations.base import finite_rows
from bitpress.kernels.scheme import Scheme

from ..methods.base import BlockView
from .base import Transformed

# Rows of a group's inputs, and of its weights, on which scales are judged: a bound on time and memory, not tuned.
_SAMPLE = 1024
_OUTPUTS = 1024
_NONE = "its inputs stay as they are"


class InputRange:
    """Per input channel the largest and the mean magnitude, float32 [in], and a sample of the inputs, [rows, in].

    The sample is spread over all calibration tokens: when it is full, every other row goes and half as many are taken.
    """

    multiplies_inputs = False
    by_gradient = False

    def __init__(self, in_features: int, device: torch.device):
        self.tokens = 0
        self.dropped = 0
        self.largest = torch.zeros(in_features, device=device)
        self._sum = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._rows: list[Tensor] = []  # copies: rows that point into an input would hold all of it in memory
        self._step = 1

    @staticmethod
    def nbytes(in_features: int) -> int:
        return 4 * in_features * (2 * _SAMPLE + 3)

    def add(self, inputs: Tensor) -> None:
        rows, dropped = finite_rows(inputs)
        self.dropped += dropped
        if not len(rows):
            return
        magnitudes = rows.abs().to(torch.float32)
        self.largest = torch.maximum(self.largest, magnitudes.amax(0))
        self._sum += magnitudes.sum(0, dtype=torch.float64)
        start = -self.tokens % self._step
        self._rows.append(rows[start :: self._step].to(torch.float32, copy=True))
        self.tokens += len(rows)
        while sum(map(len, self._rows)) > 2 * _SAMPLE:
            self._rows, self._step = [torch.cat(self._rows)[::2].clone()], 2 * self._step

    def state_dict(self) -> dict[str, Tensor]:
        counts = torch.tensor([self.tokens, self.dropped, self._step])
        rows = torch.cat([self.largest.new_empty(0, len(self.largest)), *self._rows])
        return {"largest": self.largest, "sum": self._sum, "rows": rows, "counts": counts}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.tokens, self.dropped, self._step = state["counts"].tolist()
        self.largest.copy_(state["largest"])
        self._sum.copy_(state["sum"])
        self._rows = [state["rows"].to(self.largest.device)]

    @property
    def mean(self) -> Tensor:
        return (self._sum / max(1, self.tokens)).to(torch.float32)

    def sample(self) -> Tensor:
        rows = torch.cat(self._rows)
        return rows[:: len(rows) // _SAMPLE or 1]


class Scaling(ABC):
    """Gives each group of a block's layers the scale, among those proposed, that makes the block's outputs best.

    A group keeps its inputs as they are where nothing makes them that a scale can move into, and where no proposed
    scale is better.
    """

    name: ClassVar[str]
    rank: ClassVar[int]
    version: ClassVar[int]
    about: ClassVar[str]
    solves: ClassVar[int] = 0  # of 0, the block's outputs are judged with weights rounded to nearest

    @abstractmethod
    def propose(self, inputs: InputRange, weights: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Scales [in] > 0 to be tried, each with words for it.

        Args:
            weights: the largest magnitude [in] of each column of the group's weights.
        """

    def transform(self, block: BlockView) -> list[Transformed]:
        """Fold the best scale of each group.

        Two figures of the layers' own outputs, on a sample of their inputs, choose a scale each: the relative squared
        error of the whole, and its mean over tokens. They differ where a few tokens have massive activations. The
        block's outputs decide between the two, and between these and none.
        """
        lines = []
        for group, folding, inputs in zip(block.groups, block.foldings, block.collect(InputRange)):
            if folding is None or not inputs.tokens:
                continue
            sample, layers = inputs.sample(), []
            rows = folding.rows.to(sample.device)
            named = {layer: block.tensor(f"{layer}.weight").to(sample) for layer in group.layers}
            largest = torch.stack([weight.abs().amax(0) for weight in named.values()]).amax(0)
            schemes = {layer: scheme for layer in named if (scheme := block.scheme(layer)) and scheme.weight.nearest}
            for layer, scheme in schemes.items():
                part = named[layer][:: len(named[layer]) // _OUTPUTS or 1]
                layers.append((part, scheme, sample @ part.t()))
            scales = {_NONE: torch.ones_like(largest)}
            own: dict[str, tuple[float, float]] = {}
            for words, proposed in self.propose(inputs, largest):
                level = proposed.clamp(min=torch.finfo(torch.float32).tiny).log2()
                shared = level.new_full((int(rows.max()) + 1,), -torch.inf).scatter_reduce(0, rows, level, "amax")
                level = shared[rows]  # inputs that one row makes share the largest of their scales
                scales[words] = (level - level.median()).round().clamp(-24, 24).exp2()
                own[words] = _errors(layers, sample, scales[words])
            errors = {}
            for words in (_NONE, *(min(own, key=lambda each: own[each][figure]) for figure in (0, 1))):
                if words not in errors:
                    products = {}
                    for layer, scheme in schemes.items():
                        rounded = block.as_quantized(layer, scales[words]) if self.solves else None
                        if rounded is None:
                            rounded = _rounded(named[layer] * scales[words], scheme)
                        products[layer] = _product(rounded, scheme, scales[words], sample)
                    errors[words] = block.error(products)
            chosen = min(errors, key=lambda each: errors[each])
            if chosen != _NONE:
                block.fold(folding, scales[chosen].cpu())
            lines.append(Transformed(group.layers, errors[_NONE], errors[chosen], chosen))
        return lines


def _rounded(weight: Tensor, scheme: Scheme) -> Tensor:
    """A weight [out, in] as rounding to nearest leaves it, float32."""
    assert scheme.weight.nearest is not None
    tensors = scheme.weight.nearest(weight, torch.float32)
    return scheme.weight.dequantize((weight.shape[0], weight.shape[1]), tensors, torch.float32)


def _errors(layers: list[tuple[Tensor, Scheme, Tensor]], inputs: Tensor, scale: Tensor) -> tuple[float, float]:
    """The relative squared error of layers' outputs when they are rounded to nearest, and its mean over tokens.

    Both are summed over the layers.

    Args:
        layers: weight [out, in], its scheme, and the outputs [tokens, out] that are expected. inputs: [tokens, in].
        scale: [in], by which inputs are divided, and columns of weights multiplied.
    """
    whole = tokens = 0.0
    for weight, scheme, expected in layers:
        lost = (_product(_rounded(weight * scale, scheme), scheme, scale, inputs)(inputs) - expected).square().sum(1)
        size = expected.square().sum(1)
        whole += (lost.sum() / size.sum().clamp(min=1e-30)).item()
        tokens += (lost / size.clamp(min=1e-30)).mean().item()
    return whole, tokens


def _product(rounded: Tensor, scheme: Scheme, scale: Tensor, sample: Tensor) -> Callable[[Tensor], Tensor]:
    """What a layer makes of inputs that are divided by a scale.

    Args:
        rounded: its weight [out, in], of which the columns were multiplied by the scale before they were quantized.
        sample: inputs [tokens, in] that static activations are calibrated on.
    """
    activations = scheme.activations
    if activations is None:
        return lambda x: (x / scale) @ rounded.t()
    own = _input_tensors(scheme, sample / scale, rounded)
    return lambda x: activations.apply(x / scale, own) @ rounded.t()


def _input_tensors(scheme: Scheme, inputs: Tensor, rounded: Tensor) -> dict[str, Tensor]:
    """What static activations would store for these inputs; {} for dynamic ones.

    It is what the observer that is best for the outputs would store. A scale makes weights large where inputs were, so
    what little is left of these inputs counts much.

    Args:
        inputs: [tokens, in]. rounded: the weight [out, in] that they meet.
    """
    static = scheme.static
    if static is None:
        return {}
    statistics = {kind: kind(inputs.shape[1], inputs.device) for kind in static.statistics}
    for statistic in statistics.values():
        statistic.add(inputs)
    expected = inputs @ rounded.t()
    size = expected.square().sum(1)

    def error(own: dict[str, Tensor]) -> float:
        lost = (static.apply(inputs, own) @ rounded.t() - expected).square().sum(1)
        return ((lost / size.clamp(min=1e-30)).mean() + lost.sum() / size.sum().clamp(min=1e-30)).item()

    choices = []
    for observer in static.tried:
        own = static.tensors(statistics, observer)
        choices.append({name: tensor.to(inputs.device) for name, tensor in own.items()})
    return min(choices, key=error)
