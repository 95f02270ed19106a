"""NF4 (QLoRA, arXiv 2305.14314) by the bitsandbytes package, whose format it is."""

import torch
from torch import Tensor

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme
from bitpress.kernels.weights.nf4 import NF4_BLOCK, NestedScales

from ..errors import ConfigError
from .base import Diagnostics
from .hessian import Hessian

_ZERO_PAIR = 0x77  # two codes of 0.0


class NF4:
    name = "nf4"
    version = 1
    needs_calibration = False

    def problems(self, scheme: Scheme) -> list[str]:
        return [] if scheme.code == "nf4" else [f"nf4 produces nf4 and nf4-dq, not {scheme.name}"]

    def quantize(
        self, weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, hessian: Hessian | None = None
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
        extra = {}
        if scheme.double_quant:
            inner = state.state2
            offset = state.offset.to(torch.float32).reshape(())
            extra = NestedScales(inner.absmax, inner.code.to(torch.float32), offset).tensors()
        shape = (weight.shape[0], weight.shape[1])
        qtensor = QTensor(scheme, shape, self._keep_zeros(wide, codes), state.absmax, extra=extra)
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
