"""NF4 (QLoRA, arXiv 2305.14314) by the bitsandbytes package, whose format it is."""

from typing import Any

import torch
from torch import Tensor

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme
from bitpress.kernels.weights.nf4 import NF4_BLOCK, NestedScales

from ..errors import ConfigError
from ..system.packages import install
from .base import Diagnostics, Method

_ZERO_PAIR = 0x77  # two codes of 0.0


class NF4(Method):
    name = "nf4"
    rank = 20
    version = 1
    packages = ("bitsandbytes",)

    def problems(self, scheme: Scheme) -> list[str]:
        weight = scheme.weight.description()
        own = (weight.type, weight.num_bits, weight.group_size) == ("codebook", 4, NF4_BLOCK)
        return [] if own and not scheme.weight.nearest else [f"nf4 produces nf4 and nf4-dq, not {scheme.name}"]

    def quantize(
        self, weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, statistics: tuple[Any, ...] = ()
    ) -> tuple[QTensor, Diagnostics]:
        try:
            from bitsandbytes.functional import quantize_4bit
        except ImportError as error:
            raise ConfigError(f"nf4 needs the bitsandbytes package ({error}); {install('bitsandbytes')}") from error
        shape = (weight.shape[0], weight.shape[1])
        double = "nested.absmax" in scheme.weight.layout(shape)
        wide = weight.to(torch.float32)
        packed, state = quantize_4bit(wide, blocksize=NF4_BLOCK, compress_statistics=double, quant_type="nf4")
        codes = packed.flatten().clone()
        # blocks of zeros get the code of 0.0, whatever the division by their absmax of 0 gave
        whole = weight.numel() // NF4_BLOCK
        zero = ~wide.flatten()[: whole * NF4_BLOCK].view(whole, NF4_BLOCK).any(1)
        codes[: whole * NF4_BLOCK // 2].view(whole, NF4_BLOCK // 2)[zero] = _ZERO_PAIR
        extra = {}
        if double:
            inner = state.state2
            offset = state.offset.to(torch.float32).reshape(())
            extra = NestedScales(inner.absmax, inner.code.to(torch.float32), offset).tensors()
        qtensor = QTensor(scheme, shape, codes, state.absmax, extra=extra)
        norm = torch.linalg.vector_norm(wide)
        lost = torch.linalg.vector_norm(qtensor.dequantize() - wide)
        return qtensor, Diagnostics((lost / norm).item() if norm else 0.0)


PLUGINS = (NF4(),)
