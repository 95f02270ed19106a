"""What the protocol promises, for the examples of every weight type; a new type joins by itself."""

import pytest
import torch

from bitpress.kernels.linear import QLinear
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme, examples

SHAPE = (32, 256)
NAMES = [name for name in examples() if not Scheme.parse(name).activations]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_it_says(name: str) -> None:
    scheme = Scheme.parse(name)
    weight, generator = scheme.weight, torch.Generator().manual_seed(0)
    assert scheme.name == weight.name == name
    described = Scheme.from_description(weight.description()).weight
    assert described.description() == weight.description()  # nf4-dq is described as nf4 is
    assert weight.problems(SHAPE) == []
    assert weight.fitted(SHAPE) == weight
    q = QTensor.of(scheme, SHAPE, weight.random(SHAPE, generator))
    q.check()
    whole = q.dequantize()
    assert whole.shape == SHAPE
    assert 0.01 < whole.std() < 100
    x = torch.randn(3, SHAPE[1], generator=generator)
    torch.testing.assert_close(QLinear(q, None, torch.float32, kernel="reference")(x), x @ whole.t())


@pytest.mark.parametrize("name", [name for name in NAMES if Scheme.parse(name).weight.nearest])
def test_zeros_are_exact_and_the_rest_is_near(name: str) -> None:
    """The bound holds for any sensible type of so many bits, floats of 3 bits of mantissa among them."""
    scheme = Scheme.parse(name)
    nearest = scheme.weight.nearest
    assert nearest is not None
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    weight[3], weight[:, :128] = 0, 0
    q = QTensor.of(scheme, SHAPE, nearest(weight, torch.float32))
    q.check()
    assert (q.dequantize()[weight == 0] == 0).all()
    assert torch.linalg.norm(q.dequantize() - weight) < 3 * 2.0 ** -min(scheme.bits, 5) * torch.linalg.norm(weight)


@pytest.mark.parametrize("name", NAMES)
def test_plain_elements_lead_back(name: str) -> None:
    scheme = Scheme.parse(name)
    q = QTensor.of(scheme, SHAPE, scheme.random(SHAPE, torch.Generator().manual_seed(2)))
    if (parts := scheme.weight.elements(SHAPE, dict(q.tensors()))) is None:
        return
    again = QTensor.of(scheme, SHAPE, {**dict(q.tensors()), **scheme.weight.from_elements(SHAPE, *parts)})
    assert torch.equal(again.dequantize(), q.dequantize())
