"""FP8 inputs with one calibrated scale, and int8 inputs beside weights of few bits."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bitpress.kernels.activations.fp8 import Fp8Tensor
from bitpress.kernels.activations.int8_tensor import InputCounts
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.registry import registry, select
from bitpress.kernels.scheme import Scheme

CPU = torch.device("cpu")


def counted(x: torch.Tensor) -> dict[type, InputCounts]:
    counts = InputCounts(x.shape[-1], CPU)
    counts.add(x)
    return {InputCounts: counts}


def test_the_largest_input_becomes_448() -> None:
    kind = Fp8Tensor()
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    tensors = kind.tensors(counted(x))
    assert tensors["input_scale"].item() == pytest.approx(x.abs().max().item() / 448, rel=1e-6)
    wide = (x / tensors["input_scale"]).numpy()  # E4M3: 3 bits after the leading one, down to 2^-9
    step = np.exp2(np.maximum(np.floor(np.log2(np.abs(wide) + 1e-30)), -6) - 3)
    expected = np.round(wide / step) * step * tensors["input_scale"].numpy()
    assert np.array_equal(kind.apply(x, tensors).numpy(), expected.astype(np.float32))
    for observer in kind.observers:
        zeros = kind.tensors(counted(torch.zeros(4, 8)), observer)
        assert zeros["input_scale"].item() == 1


def test_what_is_beyond_the_range_is_clamped_and_nan_stays() -> None:
    x = torch.tensor([[1000.0, -1000.0, torch.nan, 0.0]])
    y = Fp8Tensor().apply(x, {"input_scale": torch.tensor([1.0])})
    assert y[0, :2].tolist() == [448, -448]
    assert y[0, 2].isnan()
    with pytest.raises(ValueError, match="expected a positive number"):
        Fp8Tensor().check({"input_scale": torch.tensor([0.0])})


def test_descriptions() -> None:
    assert Fp8Tensor.from_description({"num_bits": 8, "type": "float", "strategy": "tensor"}) == Fp8Tensor()
    assert Fp8Tensor.from_description({**Fp8Tensor().description(), "dynamic": True}) is None


@pytest.mark.parametrize("name", ["int4-g64-int8-dynamic", "int3-channel-asym-int8-dynamic", "int2-g32-int8-dynamic"])
def test_whole_rows_are_rounded_before_the_product(name: str) -> None:
    """By the reference and by every kernel that serves such a scheme, against codes and products in float64."""
    generator = torch.Generator().manual_seed(0)
    scheme = Scheme.parse(name)
    qtensor = QTensor.of(scheme, (48, 192), scheme.random((48, 192), generator))
    x, bias = torch.randn(5, 192, generator=generator), torch.randn(48, generator=generator)
    x[:, 7] *= 50  # a scale for each group of 64 would differ by far
    scales = x.abs().amax(1, keepdim=True).double() / 127
    codes = (x / scales.float()).round().double()
    expected = F.linear(codes * scales, qtensor.dequantize().double(), bias.double())
    serving = [kernel for kernel in registry() if kernel.unsupported(qtensor, torch.float32, CPU) is None]
    assert serving[0] is select(qtensor, torch.float32, CPU).kernel
    for kernel in serving:
        y = kernel.linear(x, kernel.pack(qtensor, torch.float32), bias)
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
