"""Rounds to the nearest value that the weight's type has; absmax sets the scales: a group's largest magnitude."""

import math
from typing import Any

import torch
from torch import Tensor

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme

from ..system.threads import map_threads
from .base import Diagnostics, Method

_CHUNK = 1 << 20  # weights that a thread works on at a time: few enough for the cache, enough to outweigh the calls


class Absmax(Method):
    """Rounding to nearest, for every weight type that says how (WeightType.nearest)."""

    name = "absmax"
    rank = 10
    version = 1

    def problems(self, scheme: Scheme) -> list[str]:
        return [] if scheme.weight.nearest else [f"{self.name} rounds to nearest, which {scheme.name} does not define"]

    def quantize(
        self, weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, statistics: tuple[Any, ...] = ()
    ) -> tuple[QTensor, Diagnostics]:
        kind, nearest = scheme.weight, scheme.weight.nearest
        assert nearest is not None

        def round_rows(rows: Tensor) -> tuple[dict[str, Tensor], float, float]:
            """The tensors of some rows, and the sums of squares of their error and of the rows."""
            tensors, wide = nearest(rows, scale_dtype), rows.to(torch.float32)
            error = kind.dequantize((rows.shape[0], rows.shape[1]), tensors, torch.float32).sub_(wide)
            norms = (torch.linalg.vector_norm(each).item() for each in (error, wide))
            return tensors, next(norms) ** 2, next(norms) ** 2

        by_rows = kind.description().strategy in ("channel", "group")  # no scale is shared between rows
        chunks = map_threads(round_rows, weight.split(max(1, _CHUNK // weight.shape[1])) if by_rows else [weight])
        parts, errors, norms = zip(*chunks)
        tensors = {name: torch.cat([part[name] for part in parts]) if by_rows else parts[0][name] for name in parts[0]}
        relative = math.sqrt(sum(errors) / sum(norms)) if sum(norms) else 0.0
        return QTensor.of(scheme, (weight.shape[0], weight.shape[1]), tensors), Diagnostics(relative)


PLUGINS = (Absmax(),)
