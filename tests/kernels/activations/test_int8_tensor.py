import pytest
import torch
from torch.nn import functional as F

from bitpress.kernels.activations.int8_tensor import InputCounts, Int8Tensor, Int8TensorAsymmetric
from bitpress.kernels.external.torch_int8 import TorchInt8
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme

KINDS = [Int8Tensor(), Int8TensorAsymmetric()]


def counted(x: torch.Tensor) -> dict[type, InputCounts]:
    counts = InputCounts(x.shape[1], torch.device("cpu"))
    for part in x.split(300):
        counts.add(part)
    return {InputCounts: counts}


def test_counts() -> None:
    x = torch.tensor([[1.0, -2.0], [1.0, torch.nan], [1.0, 0.5]])
    (counts,) = counted(x).values()
    assert (counts.tokens, counts.dropped, counts.low, counts.high) == (2, 1, -2.0, 1.0)
    values, times = counts.values()
    assert dict(zip(values.tolist(), times.tolist())) == {-2.0: 1, 0.5: 1, 1.0: 2}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_minmax_moves_a_value_by_half_a_code_at_most(kind: Int8Tensor, generator: torch.Generator) -> None:
    x = torch.randn(257, 13, generator=generator) + 2
    tensors = kind.tensors(counted(x), "minmax")
    # the zero point is rounded, so an end of the range may lie half a code outside
    allowed = (0.5 if kind.symmetric else 1.0) * tensors["input_scale"] * (1 + 2.0**-20)
    assert ((kind.apply(x, tensors) - x).abs() <= allowed).all()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_mse_is_the_best_and_percentile_cuts_the_tail(kind: Int8Tensor, generator: torch.Generator) -> None:
    x = torch.randn(1000, 40, generator=generator).bfloat16().float()
    x[7, 3] = 90
    error = {name: (kind.apply(x, kind.tensors(counted(x), name)) - x).square().sum().item() for name in kind.observers}
    assert error["mse"] < min(error["minmax"], error["percentile"])
    cut = kind.tensors(counted(x), "percentile")
    share = (kind.apply(x, cut) - x).abs() > 1.01 * cut["input_scale"]
    assert 0 < share.float().mean() < 3e-4


def test_zero_stays_exact_and_nan_shows(generator: torch.Generator) -> None:
    x = torch.randn(64, 8, generator=generator).relu()
    kind = Int8TensorAsymmetric()
    tensors = kind.tensors(counted(x), "mse")
    assert tensors["input_zero_point"].item() == -128  # nothing below 0 takes a code
    rounded = kind.apply(torch.tensor([[0.0, torch.nan]]), tensors)
    assert rounded[0, 0] == 0
    assert rounded[0, 1].isnan()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_inputs_of_zeros(kind: Int8Tensor) -> None:
    x = torch.zeros(4, 8)
    assert all(torch.equal(kind.apply(x, kind.tensors(counted(x), name)), x) for name in kind.observers)


def test_descriptions() -> None:
    described = [kind.description() for kind in KINDS]
    assert [type(kind).from_description(own) for kind, own in zip(KINDS, described)] == KINDS
    assert Int8Tensor.from_description(described[1]) is None
    assert Int8Tensor.from_description({"num_bits": 8, "strategy": "tensor"}) == Int8Tensor()
    assert Int8TensorAsymmetric.from_description({**described[1], "dynamic": True}) is None


@pytest.mark.parametrize("name", ["int8-static", "int8-static-asym"])
def test_integer_products(name: str, generator: torch.Generator) -> None:
    """Against the product of what weight and inputs stand for."""
    scheme = Scheme.parse(name)
    qtensor = QTensor.of(scheme, (24, 40), scheme.random((24, 40), generator))
    qtensor.check()
    kernel = TorchInt8()
    if reason := kernel.unsupported(qtensor, torch.float32, torch.device("cpu")):
        pytest.skip(reason)
    x, bias = 2 * torch.randn(5, 40, generator=generator), torch.randn(24, generator=generator)
    assert scheme.static is not None
    expected = F.linear(scheme.static.apply(x, dict(qtensor.tensors())), qtensor.dequantize(), bias)
    y = kernel.linear(x, kernel.pack(qtensor, torch.float32), bias)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5 * expected.abs().max().item())  # the order of sums


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_scale_that_is_not_positive_is_refused(scale: float, generator: torch.Generator) -> None:
    scheme = Scheme.parse("int8-static")
    tensors = scheme.random((24, 40), generator) | {"input_scale": torch.tensor([scale])}
    with pytest.raises(ValueError, match="expected a positive number"):
        QTensor.of(scheme, (24, 40), tensors).check()
