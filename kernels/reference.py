"""Pure torch, every scheme, any device: the ground truth, and the last resort."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .qtensor import QTensor


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric INT8 of each row: x [..., in] -> codes int8 [..., in] in -127..127, scales float32 [..., 1].

    scale = absmax / 127, so that the largest entry of a row is exact; a row of zeros gets scale 1. A row with NaN or
    infinity has such a scale too, so that it shows in the output.
    """
    scales = x.abs().amax(-1, keepdim=True).to(torch.float32).div_(127)
    # A subnormal scale is too coarse: entries could reach beyond 127 times it. Such rows count as zero.
    scales.masked_fill_(scales < torch.finfo(torch.float32).tiny, 1)
    return (x.to(torch.float32) / scales).round_().to(torch.int8), scales


class _Held(nn.Module):
    """The QTensor as it is, its tensors as buffers."""

    def __init__(self, qtensor: QTensor):
        super().__init__()
        self.qtensor = qtensor
        for name, tensor in qtensor.tensors():
            self.register_buffer(name.replace(".", "_"), tensor, persistent=False)


class Reference:
    """Dequantize, then multiply in the input's dtype; activations of dynamic schemes are rounded to INT8 and back."""

    name: ClassVar[str] = "reference"
    quantizes_inputs: ClassVar[bool] = False

    def reject(self, qtensor: QTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        return None

    def prepare(self, qtensor: QTensor, dtype: torch.dtype) -> nn.Module:
        return _Held(qtensor)

    def linear(self, x: Tensor, prepared: nn.Module, bias: Tensor | None) -> Tensor:
        assert isinstance(prepared, _Held)
        qtensor = prepared.qtensor
        if qtensor.scheme.activations is None:
            bias = None if bias is None else bias.to(x.dtype)
            return F.linear(x, qtensor.dequantize(x.dtype), bias)
        codes, scales = quantize_rows(x)
        y = F.linear(codes.to(torch.float32) * scales, qtensor.dequantize(torch.float32))
        return (y if bias is None else y + bias.to(torch.float32)).to(x.dtype)
