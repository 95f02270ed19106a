"""Float32 products by oneDNN: the right ones, and only where they are wanted."""

import pytest
import torch
from torch import Tensor, nn

from bitpress.kernels import onednn


@pytest.fixture
def wanted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """oneDNN is the faster one; the shapes of what it multiplies."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("this torch has no oneDNN")
    shapes: list[tuple[int, ...]] = []
    own = torch.ops.mkldnn._linear_pointwise

    def product(x: Tensor, *arguments: object) -> Tensor:
        shapes.append(tuple(x.shape))
        result: Tensor = own(x, *arguments)
        return result

    monkeypatch.setattr(onednn, "faster", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", product)
    return shapes


@pytest.mark.parametrize("shape", [(16, 1), (17, 31), (2, 3, 64), (2, 40, 65)])
@pytest.mark.parametrize("biased", [False, True])
@torch.inference_mode()
def test_products(wanted: list[tuple[int, ...]], shape: tuple[int, ...], biased: bool) -> None:
    """Sums of up to 65 terms in float32, in any order; inputs and weights may lie apart."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)[..., ::2]
    weight = torch.randn(shape[-1], 13, generator=generator).t()
    bias = torch.randn(13, generator=generator) if biased else None
    y = onednn.linear(x, weight, bias)
    expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5)
    assert wanted == ([shape] if x.numel() >= 16 * shape[-1] else [])


@torch.inference_mode()
def test_sums_with_products(wanted: list[tuple[int, ...]]) -> None:
    """In place, also in a part of a tensor; factors may lie transposed."""
    generator = torch.Generator().manual_seed(0)
    whole, a, b = (torch.randn(shape, generator=generator) for shape in ((40, 9), (33, 20), (33, 9)))
    total = whole[10:30]
    expected = total.double() - 0.5 * (a.t().double() @ b.double())
    assert onednn.add_product(total, a.t(), b, alpha=-0.5) is total
    assert wanted == [(20, 33)]
    torch.testing.assert_close(whole[10:30].double(), expected, rtol=0, atol=1e-5)
    wide = onednn.add_product(torch.zeros(33, 9, dtype=torch.float64), torch.eye(33, dtype=torch.float64), b.double())
    assert torch.equal(wide, b.double())  # of another dtype: by torch
    assert len(wanted) == 1


@pytest.mark.parametrize("trained", ["x", "weight", "bias", "all"])
def test_gradients(wanted: list[tuple[int, ...]], trained: str) -> None:
    """As of float64, of what asks for one."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 20, 17), "weight": (24, 17), "bias": (24,)}
    wide = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    asked = list(shapes) if trained == "all" else [trained]
    slope = torch.randn(2, 20, 24, generator=generator, dtype=torch.float64)
    found = {}
    for dtype, function in ((torch.float32, onednn.linear), (torch.float64, torch.nn.functional.linear)):
        own = {name: tensor.to(dtype).requires_grad_(name in asked) for name, tensor in wide.items()}
        function(*own.values()).mul(slope.to(dtype)).sum().backward()
        found[dtype] = {name: tensor.grad for name, tensor in own.items()}
    assert wanted[0] == (2, 20, 17)
    for name, expected in found[torch.float64].items():
        if expected is None:
            assert found[torch.float32][name] is None
        else:
            torch.testing.assert_close(found[torch.float32][name].double(), expected, rtol=0, atol=1e-4)


def test_what_is_left_to_torch(wanted: list[tuple[int, ...]]) -> None:
    """A product of another dtype, of few rows, of none."""
    weight = torch.randn(8, 8)
    for x in (torch.randn(20, 8, dtype=torch.float64), torch.randn(15, 8), torch.randn(8), torch.randn(0, 8)):
        own = weight.to(x.dtype)
        assert torch.equal(onednn.linear(x, own), torch.nn.functional.linear(x, own))
    assert wanted == []


@torch.inference_mode()
def test_modules_of_a_model(wanted: list[tuple[int, ...]]) -> None:
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(2, 20, 8)
    with onednn.Products():
        y = model(x)
    assert wanted == [(2, 20, 8), (2, 20, 16)]
    torch.testing.assert_close(y, model(x))
    assert len(wanted) == 2


def test_an_ordinary_machine_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "faster", lambda: False)
    x, weight = torch.randn(20, 8), torch.randn(4, 8)
    assert torch.equal(onednn.linear(x, weight), torch.nn.functional.linear(x, weight))
