"""Pure torch, every scheme, any device: the ground truth, and the last resort."""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Kernel, PackedWeight, Serves
from .qtensor import QTensor


class UnpackedWeight(PackedWeight):
    """The QTensor as it is, its tensors as buffers."""

    def __init__(self, qtensor: QTensor):
        super().__init__(qtensor, **{name.replace(".", "_"): tensor for name, tensor in qtensor.tensors()})
        self.qtensor = qtensor


class Reference(Kernel):
    """Dequantize, then multiply in the input's dtype; where the scheme quantizes inputs, in float32."""

    rank: ClassVar[int] = 100  # behind all others
    name: ClassVar[str] = "reference"
    serves: ClassVar[tuple[Serves, ...]] = ()  # every scheme: it asks the weight type and the activations themselves
    last_resort: ClassVar[bool] = True

    def unsupported(self, qtensor: QTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        return None

    def pack(self, qtensor: QTensor, dtype: torch.dtype) -> PackedWeight:
        return UnpackedWeight(qtensor)

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        assert isinstance(packed, UnpackedWeight)
        qtensor = packed.qtensor
        activations = qtensor.scheme.activations
        if activations is None:
            bias = None if bias is None else bias.to(x.dtype)
            return F.linear(x, qtensor.dequantize(x.dtype), bias)
        y = F.linear(activations.apply(x, dict(qtensor.tensors())), qtensor.dequantize(torch.float32))
        return (y if bias is None else y + bias.to(torch.float32)).to(x.dtype)


PLUGINS = (Reference(),)
