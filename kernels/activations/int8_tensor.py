"""INT8 inputs, one scale for all inputs of a layer, calibrated before: nothing is computed of an input as it comes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .base import finite_rows

if TYPE_CHECKING:
    from typing import Self  # Python 3.11

_LOW, _HIGH = -128, 127
_SCALE, _ZERO = "input_scale", "input_zero_point"
_PERCENTILE = 0.9999  # of a layer's inputs are in range; the usual choice (arXiv 2004.09602, section 4.2)
_RATIOS = tuple(2.0 ** (-step / 8) for step in range(64))  # of the largest input: 1 down to 1 / 235
_ROUNDS = 2  # of the search for an asymmetric range, first one end and then the other


class InputCounts:
    """How often each bfloat16 number was among a layer's inputs; the extremes as they were.

    The counts of all batches add up exactly, in whatever order they come.
    tokens: how many inputs were counted. dropped: how many were left out because they were not finite.
    """

    multiplies_inputs = True  # it has no products at all
    by_gradient = False

    def __init__(self, in_features: int, device: torch.device):
        self.tokens = 0
        self.dropped = 0
        self.low = self.high = 0.0
        self._counts = torch.zeros(1 << 16, dtype=torch.int64, device=device)  # by the number's bits

    @staticmethod
    def nbytes(in_features: int) -> int:
        return 8 << 16

    def add(self, inputs: Tensor) -> None:
        rows, dropped = finite_rows(inputs)
        self.dropped += dropped
        if not len(rows):
            return
        self.tokens += len(rows)
        low, high = (value.item() for value in rows.aminmax())
        self.low, self.high = min(self.low, low), max(self.high, high)
        limit = torch.finfo(torch.bfloat16).max
        bits = rows.clamp(-limit, limit).to(torch.bfloat16).flatten().view(torch.int16)
        self._counts += torch.bincount(bits.to(torch.int64) & 0xFFFF, minlength=1 << 16)

    def state_dict(self) -> dict[str, Tensor]:
        numbers = torch.tensor([self.low, self.high], dtype=torch.float64)
        return {"values": self._counts, "range": numbers, "counts": torch.tensor([self.tokens, self.dropped])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.low, self.high = state["range"].tolist()
        self.tokens, self.dropped = state["counts"].tolist()
        self._counts.copy_(state["values"])

    def values(self) -> tuple[Tensor, Tensor]:
        """The numbers that occurred, ascending, float32 [n], and how often each did, float64 [n]."""
        bits = self._counts.nonzero().flatten()
        values = bits.to(torch.int32).to(torch.int16).view(torch.bfloat16).to(torch.float32)
        values, order = values.sort()
        return values, self._counts[bits][order].to(torch.float64)


@dataclass(frozen=True)
class Int8Tensor:
    """q = clamp(round(x / S), -128, 127) for every input of a layer, with the S that is stored with it.

    Stored: input_scale float32 [1]; float16 and bfloat16 are read, too.
    """

    rank: ClassVar[int] = 20
    name: ClassVar[str] = "int8-tensor"
    dynamic: ClassVar[bool] = False
    schemes: ClassVar[dict[str, str]] = {"int8-static": "int8-channel"}
    statistics: ClassVar[tuple[type, ...]] = (InputCounts,)
    observers: ClassVar[tuple[str, ...]] = ("mse", "percentile", "minmax")
    # What is cut off costs several times what the same error of outputs costs when it comes of rounding. In layer 4 of
    # SmolLM2-135M a percentile cuts at 1.7, and the least squared error at 3.1. The block's error is 0.0006 and 0.0005
    # by these, KL 0.0026 and 0.0008 (at 3.4).
    tried: ClassVar[tuple[str, ...]] = ("mse", "minmax")
    symmetric: ClassVar[bool] = True

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> "Self | None":
        # Readers leave out what is so by default: `symmetric` true, `type` "int", `dynamic` false.
        facts = {"type": "int", "symmetric": True, "dynamic": False, **description}
        own = cls().description()
        return cls() if {key: facts.get(key) for key in own} == own else None

    def description(self) -> dict[str, Any]:
        return {"num_bits": 8, "type": "int", "symmetric": self.symmetric, "strategy": "tensor", "dynamic": False}

    def layout(self) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        return {_SCALE: ((1,), (torch.float32, torch.bfloat16, torch.float16))}

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        if not bool((tensors[_SCALE] > 0).all()):
            raise ValueError(f"{_SCALE} is {tensors[_SCALE].item()}, expected a positive number")

    def tensors(self, statistics: Mapping[type, Any], observer: str = "mse") -> dict[str, Tensor]:
        def error(values: Tensor, times: Tensor, limit: float) -> float:
            return _error(values, times, limit / _HIGH, 0)

        return {_SCALE: torch.tensor([nonzero(largest_kept(statistics[InputCounts], observer, error) / _HIGH)])}

    def random(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {_SCALE: (torch.rand(1, generator=generator) + 0.5) / 32}

    def codes(self, x: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """x [..., in] as int8 codes, the scale, float32 [1], and the zero point, int8 [1] or None."""
        scale, zero = tensors[_SCALE].to(torch.float32), tensors.get(_ZERO)
        codes = torch.round(x.to(torch.float32) / scale)
        codes = codes if zero is None else codes + zero.to(torch.float32)
        return codes.clamp_(_LOW, _HIGH).to(torch.int8), scale, zero

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        codes, scale, zero = self.codes(x, tensors)
        wide = codes.to(torch.float32)
        wide = (wide if zero is None else wide - zero.to(torch.float32)) * scale
        return wide.masked_fill_(x.isnan(), torch.nan)  # a code could not say so


@dataclass(frozen=True)
class Int8TensorAsymmetric(Int8Tensor):
    """q = clamp(round(x / S) + Z, -128, 127): for inputs that lean to one side, as those behind an activation do.

    Stored beside input_scale: input_zero_point int8 [1]. The range is widened to hold 0, which stays exact.
    """

    rank: ClassVar[int] = 21
    name: ClassVar[str] = "int8-tensor-asym"
    schemes: ClassVar[dict[str, str]] = {"int8-static-asym": "int8-channel"}
    symmetric: ClassVar[bool] = False

    def layout(self) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        return super().layout() | {_ZERO: ((1,), (torch.int8,))}

    def tensors(self, statistics: Mapping[type, Any], observer: str = "mse") -> dict[str, Tensor]:
        counts = statistics[InputCounts]
        low, high = min(counts.low, 0.0), max(counts.high, 0.0)
        values, times = counts.values()

        def off(low: float, high: float) -> float:
            return _error(values, times, *_grid(low, high))

        if observer == "percentile":
            beyond = (1 - _PERCENTILE) / 2
            low, high = min(_quantile(values, times, beyond), 0.0), max(_quantile(values, times, 1 - beyond), 0.0)
        elif observer == "mse":
            for _ in range(_ROUNDS):
                high = _best(high, partial(off, low))
                low = -_best(-low, partial(lambda high, limit: off(-limit, high), high))
        scale, zero = _grid(low, high)
        return {_SCALE: torch.tensor([scale]), _ZERO: torch.tensor([zero], dtype=torch.int8)}

    def random(self, generator: torch.Generator) -> dict[str, Tensor]:
        return super().random(generator) | {_ZERO: torch.randint(-9, 9, (1,), dtype=torch.int8, generator=generator)}


def largest_kept(counts: InputCounts, observer: str, error: Callable[[Tensor, Tensor, float], float]) -> float:
    """The largest magnitude that a symmetric range of inputs holds.

    Args:
        observer: "minmax", "percentile", or "mse" for the least error.
        error: error(values, times, limit), of values that occurred so many times, rounded in a range up to `limit`.
    """
    values, times = counts.values()
    if observer == "percentile":
        return _quantile(values.abs(), times, _PERCENTILE)
    largest = max(-counts.low, counts.high)
    return _best(largest, partial(error, values, times)) if observer == "mse" else largest


def nonzero(scale: float) -> float:
    """A scale that can be divided by: 1 where all inputs are 0, or nearly so."""
    return scale if scale > torch.finfo(torch.float32).tiny else 1.0


def _grid(low: float, high: float) -> tuple[float, int]:
    """S = (max - min) / 255 and Z = round(-min / S) - 128, of a range that holds 0."""
    scale = nonzero((high - low) / (_HIGH - _LOW))
    return scale, max(_LOW, min(_HIGH, round(-low / scale) + _LOW))


def _quantile(values: Tensor, times: Tensor, share: float) -> float:
    """The least value that so large a share of the inputs does not exceed."""
    values, order = values.sort()
    reached = times[order].cumsum(0)
    place = int(torch.searchsorted(reached, share * reached[-1].item()))
    return values[min(place, len(values) - 1)].item()


def _best(largest: float, error: Callable[[float], float]) -> float:
    """The part of `largest` that has the least error; the largest of equals."""
    return min((largest * ratio for ratio in _RATIOS), key=error) if largest else largest


def _error(values: Tensor, times: Tensor, scale: float, zero: int) -> float:
    """The squared error of the inputs when they are rounded, summed."""
    scale = nonzero(scale)
    rounded = ((values / scale).round() + zero).clamp(_LOW, _HIGH).sub(zero) * scale
    return ((rounded - values).to(torch.float64).square() * times).sum().item()


PLUGINS = (Int8Tensor, Int8TensorAsymmetric)
