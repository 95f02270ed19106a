"""NF4 (QLoRA, arXiv 2305.14314) by the bitsandbytes package, whose format it is."""

from typing import Any

import torch
from torch import Tensor

from bitpress.kernels.qtensor import NestedScales, QTensor
from bitpress.kernels.scheme import NF4_BLOCK, Scheme

from ..errors import ConfigError
from .base import Diagnostics, Method

_ZERO_PAIR = 0x77  # two codes of 0.0


class NF4(Method):
    name = "nf4"
    rank = 20
    version = 1
    packages = ("bitsandbytes",)

    def problems(self, scheme: Scheme) -> list[str]:
        return [] if scheme.code == "nf4" else [f"nf4 produces nf4 and nf4-dq, not {scheme.name}"]

    def quantize(
        self, weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, statistics: tuple[Any, ...] = ()
    ) -> tuple[QTensor, Diagnostics]:
        try:
            from bitsandbytes.functional import quantize_4bit
        except ImportError as error:
            raise ConfigError(f"nf4 needs the bitsandbytes package ({error}); pip install 'bitpress[bnb]'") from error
        wide = weight.to(torch.float32)
        packed, state = quantize_4bit(
            wide, blocksize=NF4_BLOCK, compress_statistics=scheme.double_quant, quant_type="nf4"
        )
        codes = packed.flatten()
        nested = None
        if scheme.double_quant:
            inner = state.state2
            nested = NestedScales(
                inner.absmax, inner.code.to(torch.float32), state.offset.to(torch.float32).reshape(())
            )
        shape = (weight.shape[0], weight.shape[1])
        qtensor = QTensor(scheme, shape, self._keep_zeros(wide, codes), state.absmax, nested=nested)
        norm = torch.linalg.vector_norm(wide)
        lost = torch.linalg.vector_norm(qtensor.dequantize() - wide)
        return qtensor, Diagnostics((lost / norm).item() if norm else 0.0)

    def _keep_zeros(self, weight: Tensor, codes: Tensor) -> Tensor:
        """Blocks of zeros get the code of 0.0, whatever the division by their absmax of 0 gave."""
        whole = weight.numel() // NF4_BLOCK
        zero = ~weight.flatten()[: whole * NF4_BLOCK].view(whole, NF4_BLOCK).any(1)
        codes = codes.clone()
        codes[: whole * NF4_BLOCK // 2].view(whole, NF4_BLOCK // 2)[zero] = _ZERO_PAIR
        return codes


PLUGINS = (NF4(),)
