"""Round to nearest, each group's scale set by its largest magnitude (symmetric) or its range (asymmetric)."""

import math
from typing import Any

import torch
from torch import Tensor

from bitpress.kernels.packing import pack
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme

from ..system.threads import map_threads
from .base import Diagnostics, Method

_CHUNK = 1 << 20  # weights that a thread works on at a time: few enough for the cache, enough to outweigh the calls


def affine_parameters(groups: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of each group: float32 [rows, groups, group_size] -> (scale_dtype, uint8) [rows, groups].

    Symmetric: S = 2 max|w| / (2^n - 1), no zero point stored. Asymmetric: the range widened to hold 0,
    S = (max - min) / (2^n - 1), Z = round(-min / S). Scales are rounded to the dtype that is stored; a group of
    zeros gets scale 1, and one too small for the dtype gets the dtype's smallest positive number.

    Raises:
        ValueError: a scale beyond the dtype's range, or weights that are not finite.
    """
    low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
    spread = high - low if not scheme.symmetric else 2 * torch.maximum(high, -low)
    scales = (spread / scheme.max_code).to(scale_dtype)
    if not torch.isfinite(scales).all():
        raise ValueError(f"a scale of {spread.max().item() / scheme.max_code:.4g} does not fit {scale_dtype}")
    # torch flushes no subnormals here: 0 comes only from spreads below half of the smallest positive number.
    smallest = {torch.float16: 2.0**-24}.get(scale_dtype, torch.finfo(scale_dtype).tiny)
    scales = torch.where(spread == 0, torch.ones_like(scales), scales.clamp(min=smallest))
    if scheme.symmetric:
        return scales, None
    zeros = torch.round(-low / scales.to(torch.float32)).clamp_(0, scheme.max_code)
    return scales, zeros.to(torch.uint8)


def encode(groups: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme) -> tuple[Tensor, float]:
    """Nearest codes uint8, and the squared error; shapes as in affine_parameters."""
    wide = scales.to(torch.float32)
    exact = groups / wide.unsqueeze(-1)
    codes = torch.round(exact)
    if zeros is None:
        codes.clamp_(-scheme.middle, scheme.max_code - scheme.middle)
        zero: Tensor | int = scheme.middle
    else:
        zero = zeros.to(torch.float32).unsqueeze(-1)
        codes.clamp_(-zero, scheme.max_code - zero)
    error = torch.linalg.vector_norm(torch.linalg.vector_norm(exact.sub_(codes), dim=-1).mul_(wide))
    return codes.add_(zero).to(torch.uint8), error.item() ** 2


class Absmax(Method):
    name = "absmax"
    rank = 10
    version = 1

    def problems(self, scheme: Scheme) -> list[str]:
        return [] if scheme.code == "int" else [f"absmax produces integer schemes, not {scheme.name}"]

    def quantize(
        self, weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, statistics: tuple[Any, ...] = ()
    ) -> tuple[QTensor, Diagnostics]:
        out_features, in_features = weight.shape
        count = scheme.groups(in_features)

        def press(rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None, float, float]:
            groups = rows.to(torch.float32).unflatten(1, (count, -1))
            scales, zeros = affine_parameters(groups, scheme, scale_dtype)
            codes, error = encode(groups, scales, zeros, scheme)
            norm = torch.linalg.vector_norm(groups).item() ** 2
            return pack(codes.flatten(1), scheme.bits), scales, zeros, error, norm

        chunks = map_threads(press, weight.split(max(1, _CHUNK // in_features)))
        codes, scales, zeros, errors, norms = zip(*chunks)
        relative = math.sqrt(sum(errors) / sum(norms)) if sum(norms) else 0.0
        together = None if scheme.symmetric else torch.cat(zeros)
        qtensor = QTensor(scheme, (out_features, in_features), torch.cat(codes), torch.cat(scales), together)
        return qtensor, Diagnostics(relative)


PLUGINS = (Absmax(),)
