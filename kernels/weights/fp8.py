"""FP8 weights: E4M3 values (Micikevicius et al., FP8 Formats for Deep Learning, 2022), and a scale for each output
channel, for each square of 128 outputs and 128 inputs, or for the whole weight."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Layout, Shape, WeightDescription
from .grid import MakeGrid
from .integer import smallest_scale

LARGEST = 448.0  # of E4M3
SQUARE = 128

_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _scales(peaks: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """The scales of these largest magnitudes as they are stored; zeros get 1.

    Raises:
        ValueError: a scale beyond the dtype's range, or weights that are not finite.
    """
    scales = (peaks / LARGEST).to(scale_dtype)
    if not torch.isfinite(scales).all():
        raise ValueError(f"a scale of {peaks.max().item() / LARGEST:.4g} does not fit {scale_dtype}")
    return torch.where(peaks == 0, torch.ones_like(scales), scales.clamp(min=smallest_scale(scale_dtype)))


@dataclass(frozen=True)
class _Grid:
    """See CodeGrid: the values of FP8 weights with a scale for each channel."""

    scale_dtype: torch.dtype

    # Steps grow with the value, so a scale of half the size has the same steps: one octave is all that there is to try.
    ratios: ClassVar[tuple[float, ...]] = tuple(2.0 ** (-step / 8) for step in range(8))
    whole: ClassVar[bool] = False
    common: ClassVar[dict[str, Tensor]] = {}

    def parameters(self, reach: Tensor) -> tuple[Tensor, None]:
        return _scales(reach.abs().amax(-1), self.scale_dtype).to(torch.float32), None

    def limits(self, scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.full_like(scales, -LARGEST), torch.full_like(scales, LARGEST)

    def nearest(self, exact: Tensor) -> Tensor:
        return exact.copy_(exact.clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn))

    def representable(self, scales: Tensor) -> Tensor:
        return scales.to(self.scale_dtype).to(torch.float32)

    def pack(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> dict[str, Tensor]:
        return {"codes": codes.to(torch.float8_e4m3fn).contiguous(), "scales": scales.to(self.scale_dtype)}


@dataclass(frozen=True)
class _TensorGrid(_Grid):
    """See CodeGrid: the values of FP8 weights with one scale, float32 [1], for the whole of a layer."""

    scale: Tensor

    ratios: ClassVar[tuple[float, ...]] = (1.0,)

    @property
    def common(self) -> dict[str, Tensor]:  # type: ignore[override]
        return {"scales": self.scale.to(self.scale_dtype)}

    def parameters(self, reach: Tensor) -> tuple[Tensor, None]:
        return self.scale.to(reach.device).expand(reach.shape[:-1]), None

    def representable(self, scales: Tensor) -> Tensor:
        return self.scale.to(scales.device).expand(scales.shape)

    def pack(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> dict[str, Tensor]:
        return {"codes": codes.to(torch.float8_e4m3fn).contiguous()}


class _Elements:
    """What types have in common whose codes are E4M3 values, one for each weight."""

    name: str
    holds_order: ClassVar[bool] = False
    bits: ClassVar[int] = 8

    def problems(self, shape: Shape) -> list[str]:
        return []

    def check(self, shape: Shape, tensors: Mapping[str, Tensor]) -> None:
        """Every code is a value, NaN aside; the scales must be positive, and their weights float32 numbers."""
        scales = tensors["scales"].to(torch.float32)
        if bad := int((scales <= 0).sum()):
            raise ValueError(f"{bad} scales are not positive")
        if bad := int((scales > torch.finfo(torch.float32).max / LARGEST).sum()):
            raise ValueError(f"{bad} scales are too large for weights in float32")

    def elements(self, shape: Shape, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, None]:
        return tensors["codes"], tensors["scales"], None

    def from_elements(self, shape: Shape, elements: Tensor, scales: Tensor, zeros: Tensor | None) -> dict[str, Tensor]:
        if elements.dtype != torch.float8_e4m3fn:
            raise ValueError(f"elements have dtype {elements.dtype}, expected torch.float8_e4m3fn")
        if zeros is not None:
            raise ValueError(f"{self.name} has no zero points")
        return {"codes": elements, "scales": scales}


@dataclass(frozen=True)
class Float8(_Elements):
    """A weight is a scale times an E4M3 value.

    codes: float8_e4m3fn [out, in]. scales: float16, bfloat16 or float32 [out, 1]; where `squares`, [ceil(out / 128),
    ceil(in / 128)], the last squares being cut where 128 does not divide the weight's sizes.
    """

    squares: bool = False

    rank: ClassVar[int] = 30
    forms: ClassVar[str] = "fp8 or fp8-b128"
    examples: ClassVar[tuple[str, ...]] = ("fp8", "fp8-b128")

    @classmethod
    def parse(cls, name: str) -> "Float8 | None":
        return cls(name == "fp8-b128") if name in cls.examples else None

    @classmethod
    def from_description(cls, description: WeightDescription) -> "Float8 | None":
        return next((kind for kind in (cls(), cls(True)) if kind.description() == description), None)

    @property
    def name(self) -> str:  # type: ignore[override]
        return "fp8-b128" if self.squares else "fp8"

    @property
    def grid(self) -> MakeGrid | None:
        return None if self.squares else lambda _, scale_dtype: _Grid(scale_dtype)

    def description(self) -> WeightDescription:
        if self.squares:
            return WeightDescription("float", self.bits, "block", SQUARE)
        return WeightDescription("float", self.bits, "channel")

    def fitted(self, shape: Shape) -> "Float8":
        return self

    def layout(self, shape: Shape) -> Layout:
        grid = (-(-shape[0] // SQUARE), -(-shape[1] // SQUARE)) if self.squares else (shape[0], 1)
        return {"codes": (shape, (torch.float8_e4m3fn,)), "scales": (grid, _SCALE_DTYPES)}

    def dequantize(self, shape: Shape, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return (tensors["codes"].to(torch.float32) * self._spread(tensors["scales"], shape)).to(dtype)

    def nearest(self, weight: Tensor, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        """Each scale is set by the largest magnitude that it serves, which becomes 448.

        Raises:
            ValueError: a scale beyond the dtype's range, or weights that are not finite.
        """
        wide, shape = weight.to(torch.float32), (weight.shape[0], weight.shape[1])
        if self.squares:
            whole = F.pad(wide.abs(), (0, -shape[1] % SQUARE, 0, -shape[0] % SQUARE))
            peaks = whole.unflatten(1, (-1, SQUARE)).unflatten(0, (-1, SQUARE)).amax((1, 3))
        else:
            peaks = wide.abs().amax(1, keepdim=True)
        scales = _scales(peaks, scale_dtype)
        codes = (wide / self._spread(scales, shape)).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return {"codes": codes, "scales": scales}

    def _spread(self, scales: Tensor, shape: Shape) -> Tensor:
        """float32 scales that a weight of this shape can be multiplied by."""
        wide = scales.to(torch.float32)
        if not self.squares:
            return wide
        return wide.repeat_interleave(SQUARE, 0)[: shape[0]].repeat_interleave(SQUARE, 1)[:, : shape[1]]

    def factored_scales(self, shape: Shape, tensors: Mapping[str, Tensor]) -> tuple[Tensor, float]:
        scales = tensors["scales"].to(torch.float32)
        return (scales.repeat_interleave(SQUARE, 0)[: shape[0]] if self.squares else scales), 1.0

    def random(self, shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
        return self.nearest(torch.randn(shape, generator=generator), torch.float32)

    def rows(self, shape: Shape, tensors: Mapping[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
        if self.squares:
            raise ValueError(f"{SQUARE} rows share their scales")
        return {"codes": tensors["codes"][ids], "scales": tensors["scales"][ids]}


@dataclass(frozen=True)
class Float8Tensor(_Elements):
    """A weight is an E4M3 value times the one scale of the layer.

    codes: float8_e4m3fn [out, in]. scales: float16, bfloat16 or float32 [1].

    Args:
        peak: float32 [], the largest magnitude of all layers that share a scale. None: the layer has its own. What a
            type is called does not depend on it.
    """

    peak: Tensor | None = field(default=None, compare=False, repr=False)

    rank: ClassVar[int] = 31
    name: ClassVar[str] = "fp8-tensor"  # type: ignore[misc]
    forms: ClassVar[str] = "fp8-tensor"
    examples: ClassVar[tuple[str, ...]] = ("fp8-tensor",)

    @classmethod
    def parse(cls, name: str) -> "Float8Tensor | None":
        return cls() if name == cls.name else None

    @classmethod
    def from_description(cls, description: WeightDescription) -> "Float8Tensor | None":
        return cls() if description == cls().description() else None

    def description(self) -> WeightDescription:
        return WeightDescription("float", self.bits, "tensor")

    def fitted(self, shape: Shape) -> "Float8Tensor":
        return self

    def fused(self, weights: Iterable[Tensor]) -> "Float8Tensor":
        """This type with the scale that these weights have in common: servers multiply by them as by one, and round
        them again where their scales differ."""
        peaks = [weight.abs().amax().to(torch.float32).cpu() for weight in weights]
        return replace(self, peak=torch.stack(peaks).amax())

    def layout(self, shape: Shape) -> Layout:
        return {"codes": (shape, (torch.float8_e4m3fn,)), "scales": ((1,), _SCALE_DTYPES)}

    def dequantize(self, shape: Shape, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return (tensors["codes"].to(torch.float32) * tensors["scales"].to(torch.float32)).to(dtype)

    def nearest(self, weight: Tensor, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        """The largest magnitude becomes 448.

        Raises:
            ValueError: a scale beyond the dtype's range, or weights that are not finite.
        """
        wide, scales = weight.to(torch.float32), self._scale(weight, scale_dtype)
        codes = (wide / scales.to(torch.float32)).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return {"codes": codes, "scales": scales}

    def grid(self, weight: Tensor, scale_dtype: torch.dtype) -> _TensorGrid:
        return _TensorGrid(scale_dtype, self._scale(weight, scale_dtype).to(torch.float32))

    def _scale(self, weight: Tensor, scale_dtype: torch.dtype) -> Tensor:
        peak = weight.abs().amax().to(torch.float32) if self.peak is None else self.peak.to(weight.device)
        return _scales(peak.reshape(1), scale_dtype)

    def factored_scales(self, shape: Shape, tensors: Mapping[str, Tensor]) -> tuple[Tensor, float]:
        return tensors["scales"].to(torch.float32).expand(shape[0], 1), 1.0

    def random(self, shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
        return self.nearest(torch.randn(shape, generator=generator), torch.float32)

    def rows(self, shape: Shape, tensors: Mapping[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
        return {"codes": tensors["codes"][ids], "scales": tensors["scales"]}

    def from_elements(self, shape: Shape, elements: Tensor, scales: Tensor, zeros: Tensor | None) -> dict[str, Tensor]:
        """The scale may have any number of dimensions: files have [], [1] or [1, 1]."""
        own = super().from_elements(shape, elements, scales, zeros)
        return own | {"scales": scales.reshape(1) if scales.numel() == 1 else scales}


PLUGINS = (Float8, Float8Tensor)
