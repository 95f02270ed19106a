"""INT8 weights and INT8 activations: integer products in INT32, which are exact, and scales in float32."""

from typing import ClassVar

import torch
from torch import Tensor

from ..activations.int8_tensor import Int8Tensor, Int8TensorAsymmetric
from ..activations.int8_token import Int8Token, Int8TokenAsymmetric
from ..base import Kernel, PackedWeight, Serves
from ..packing import unpack
from ..qtensor import QTensor
from ..weights.integer import Integer

_CPU_MIN_ROWS = 4  # for one or two rows of a small matrix oneDNN falls to a plain loop, 20 times slower
_CUDA_MIN_ROWS = 17  # torch._int_mm on CUDA wants more than 16 rows, and multiples of 8 for the other dimensions


class Int8Weight(PackedWeight):
    """`weight`: int8 [out, in], oneDNN's own layout on CPU; `scales`: float32 [out]; `zeros`: int64 [out], CPU only.

    `input_scale`, `input_zero_point`: of static activations, as the layer stores them; `shifts`: float32 [out], what a
    zero point of 1 adds to each output, where inputs have zero points. Other layers do not have them.
    """

    weight: Tensor
    scales: Tensor
    zeros: Tensor


class TorchInt8(Kernel):
    """int8-dynamic and int8-static: oneDNN's prepacked product on CPUs with VNNI, `torch._int_mm` on CUDA."""

    rank: ClassVar[int] = 31
    name: ClassVar[str] = "torch-int8"
    serves: ClassVar[tuple[Serves, ...]] = (
        Serves("int8-dynamic", Integer, (8,), Int8Token),
        Serves("int8-dynamic-asym", Integer, (8,), Int8TokenAsymmetric),
        Serves("int8-static", Integer, (8,), Int8Tensor),
        Serves("int8-static-asym", Integer, (8,), Int8TensorAsymmetric),
    )

    def unsupported(self, qtensor: QTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        if reason := self.unserved(qtensor.scheme):
            return reason
        if not dtype.is_floating_point:
            return f"inputs are {dtype}, expected a floating dtype"
        if device.type == "cpu":
            if not torch.backends.mkldnn.is_available():
                return "this PyTorch was built without oneDNN"
            # Without VNNI, oneDNN adds pairs of products in 16 bits, which saturate.
            return None if torch.cpu._is_vnni_supported() else "needs a CPU with AVX512-VNNI"
        if device.type != "cuda":
            return f"runs on x86 CPUs and CUDA GPUs, not on {device.type}"
        if any(size % 8 for size in qtensor.shape):
            return f"shape {list(qtensor.shape)} is not divisible by 8 in both dimensions, as CUDA's product needs"
        return None

    def pack(self, qtensor: QTensor, dtype: torch.dtype) -> PackedWeight:
        codes = unpack(qtensor.codes, 8, qtensor.shape[1])
        weight = (codes ^ 128).view(torch.int8)  # code - 128 in two's complement
        scales = qtensor.scales.flatten().to(torch.float32)
        inputs = {
            name: qtensor.extra[name] for name in (qtensor.scheme.static.layout() if qtensor.scheme.static else ())
        }
        if qtensor.scheme.shifts_inputs:
            inputs["shifts"] = weight.sum(1, dtype=torch.int64).to(torch.float32) * scales
        if weight.is_cuda:
            return Int8Weight(qtensor, weight=weight, scales=scales, **inputs)
        packed = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
        zeros = torch.zeros_like(scales, dtype=torch.int64)
        return Int8Weight(qtensor, weight=packed, scales=scales, zeros=zeros, **inputs)

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        assert isinstance(packed, Int8Weight)
        out_features, in_features = packed.shape
        rows = x.reshape(-1, in_features)
        if len(rows) == 0:
            return x.new_empty(*x.shape[:-1], out_features)
        assert packed.scheme.activations is not None
        codes, row_scales, zero = packed.scheme.activations.codes(rows, dict(packed.named_buffers()))
        y = _product_cuda(codes, packed) if codes.is_cuda else _product_cpu(codes, packed)
        if zero is not None:
            y -= zero * packed.get_buffer("shifts")
        y *= row_scales
        if bias is not None:
            y += bias
        return y.to(x.dtype).view(*x.shape[:-1], out_features)


def _product_cpu(codes: Tensor, packed: Int8Weight) -> Tensor:
    """int8 [rows, in] -> float32 [rows, out], the channels' scales applied.

    oneDNN gets codes as uint8 with the zero point 128: signed ones it multiplies in a plain loop on some CPUs (Zen 5
    and torch 2.13: 512 rows by 1536 x 576 take 29 s, and 1 ms as uint8).
    """
    rows = len(codes)
    codes = torch.nn.functional.pad(codes, (0, 0, 0, max(_CPU_MIN_ROWS - rows, 0)))
    product = torch.ops.onednn.qlinear_pointwise(
        codes.contiguous().view(torch.uint8) ^ 128, 1.0, 128, packed.weight, packed.scales, packed.zeros,
        None, 1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return product[:rows]


def _product_cuda(codes: Tensor, packed: Int8Weight) -> Tensor:
    """int8 [rows, in] -> float32 [rows, out], the channels' scales applied."""
    rows = len(codes)
    codes = torch.nn.functional.pad(codes, (0, 0, 0, max(_CUDA_MIN_ROWS - rows, 0)))
    product = torch._int_mm(codes.contiguous(), packed.weight.t())
    return product[:rows] * packed.scales


PLUGINS = (TorchInt8(),)
