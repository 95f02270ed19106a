"""Round to nearest, each group's scale set by its largest magnitude (symmetric) or its range (asymmetric)."""

import math

import torch
from torch import Tensor

from bitpress.kernels.packing import pack
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme
from bitpress.kernels.weights.integer import affine_parameters, encode

from ..system.threads import map_threads
from .base import Diagnostics
from .hessian import Hessian

_CHUNK = 1 << 20  # weights that a thread works on at a time: few enough for the cache, enough to outweigh the calls


class Absmax:
    name = "absmax"
    version = 1
    needs_calibration = False

    def problems(self, scheme: Scheme) -> list[str]:
        return [] if scheme.code == "int" else [f"absmax produces integer schemes, not {scheme.name}"]

    def quantize(
        self, weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, hessian: Hessian | None = None
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
