"""What is private to PyTorch's layout; the products are tested in test_registry.py."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bitpress.kernels.external.torch_int4 import TorchInt4
from bitpress.kernels.qtensor import QTensor

Make = Callable[..., QTensor]

CPU = torch.device("cpu")


TOLERANCE = 2.0**-8 + 2.0**-20  # relative RMS: bfloat16's rounding of outputs, scales and zeros; float32's sums


def relative(found: Tensor, q: QTensor, x: Tensor) -> float:
    """RMS error relative to the exact product."""
    expected = x.double() @ q.dequantize().double().t()
    return float((found.double() - expected).norm() / expected.norm())


def test_int4_layout_is_read_off_and_both_ways_agree(make_qtensor: Make, generator: torch.Generator) -> None:
    q, kernel = make_qtensor("int4-g64-asym", 640, 128), TorchInt4()
    if reason := kernel.unsupported(q, torch.bfloat16, CPU):
        pytest.skip(reason)
    packed = kernel.pack(q, torch.bfloat16)
    assert packed.block in (32, 64)  # without it the operator would serve all rows, correctly and slowly
    x = torch.randn(65, 128, generator=generator).to(torch.bfloat16)
    dequantized = kernel.linear(x, packed, None)
    packed.block = None
    operator = kernel.linear(x, packed, None)
    assert not torch.equal(operator, dequantized)
    assert relative(operator, q, x) <= TOLERANCE
    assert relative(dequantized, q, x) <= TOLERANCE


def test_int4_group_of_scale_zero(make_qtensor: Make) -> None:
    q, kernel = make_qtensor("int4-g32-asym", 64, 64), TorchInt4()
    if reason := kernel.unsupported(q, torch.bfloat16, CPU):
        pytest.skip(reason)
    q.scales[:, 0] = 0
    x = torch.ones(65, 64, dtype=torch.bfloat16)
    packed = kernel.pack(q, torch.bfloat16)
    for rows in (1, 65):
        assert relative(kernel.linear(x[:rows], packed, None), q, x[:rows]) <= 2**-8
