"""Products by oneDNN, and by way of float32: the right ones, and only where they are wanted."""

import pytest
import torch
from torch import Tensor, nn

from bitpress.kernels import products


@pytest.fixture
def wanted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The other ways are the faster ones; the shapes of what oneDNN multiplies."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("this torch has no oneDNN")
    shapes: list[tuple[int, ...]] = []
    own = torch.ops.mkldnn._linear_pointwise

    def product(x: Tensor, *arguments: object) -> Tensor:
        shapes.append(tuple(x.shape))
        result: Tensor = own(x, *arguments)
        return result

    monkeypatch.setattr(products, "faster", lambda dtype: dtype != torch.float64)
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
    y = products.linear(x, weight, bias)
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
    assert products.add_product(total, a.t(), b, alpha=-0.5) is total
    assert wanted == [(20, 33)]
    torch.testing.assert_close(whole[10:30].double(), expected, rtol=0, atol=1e-5)
    wide = products.add_product(torch.zeros(33, 9, dtype=torch.float64), torch.eye(33, dtype=torch.float64), b.double())
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
    for dtype, function in ((torch.float32, products.linear), (torch.float64, torch.nn.functional.linear)):
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
        assert torch.equal(products.linear(x, own), torch.nn.functional.linear(x, own))
    assert wanted == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
@torch.inference_mode()
def test_two_bytes_by_way_of_float32(
    wanted: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, biased: bool
) -> None:
    """Exact sums, rounded once; the weight is widened in pieces, the last of which may be a smaller one."""
    monkeypatch.setattr(products, "_PIECE", 5 * 33)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randint(-8, 9, shape, generator=generator).to(dtype) / 8 for shape in ((3, 20, 33), (13, 33), (13,))
    )
    y = products.linear(x, weight, bias if biased else None)
    expected = x.double() @ weight.double().t() + (bias.double() if biased else 0)
    assert torch.equal(y, expected.to(dtype))
    assert wanted == [(3, 20, 33)] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_two_bytes(wanted: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((20, 17), (24, 17)))
    slope = torch.randn(20, 24, generator=generator).to(dtype)
    own, wide = ([t.to(kind, copy=True).requires_grad_() for t in (x, weight)] for kind in (dtype, torch.float64))
    products.linear(*own).backward(slope)
    torch.nn.functional.linear(*wide).backward(slope.double())
    assert len(wanted) == 3
    for mine, exact in zip(own, wide, strict=True):
        assert mine.grad is not None
        assert exact.grad is not None
        torch.testing.assert_close(mine.grad, exact.grad.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [None, torch.bool, torch.float16])
def test_attention(wanted: list[tuple[int, ...]], dtype: torch.dtype, masked: torch.dtype | None) -> None:
    """Of float64, rounded once, and its gradients; masks are bool, or of the dtype of the queries."""
    generator = torch.Generator().manual_seed(0)
    own = [torch.randn(2, heads, 20, 16, generator=generator).to(dtype).requires_grad_() for heads in (4, 2, 2)]
    wide = [tensor.detach().double().requires_grad_() for tensor in own]
    seen = torch.rand(2, 1, 20, 20, generator=generator) < 0.9
    added = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -1000.0)
    how = {"is_causal": True} if masked is None else {"attn_mask": seen if masked == torch.bool else added}
    with products.Products():
        found = nn.functional.scaled_dot_product_attention(*own, **how, enable_gqa=True)
    how = {
        key: value.double() if torch.is_tensor(value) and value.dtype == dtype else value for key, value in how.items()
    }
    expected = nn.functional.scaled_dot_product_attention(*wide, **how, enable_gqa=True)
    assert found.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=0.51 * step, atol=1e-6)
    found.backward(torch.ones_like(found))
    expected.backward(torch.ones_like(expected))
    for mine, exact in zip(own, wide, strict=True):
        torch.testing.assert_close(mine.grad.double(), exact.grad, rtol=0.51 * step, atol=1e-5)  # type: ignore[union-attr]


@torch.inference_mode()
def test_modules_of_a_model(wanted: list[tuple[int, ...]]) -> None:
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(2, 20, 8)
    with products.Products():
        y = model(x)
    assert wanted == [(2, 20, 8), (2, 20, 16)]
    torch.testing.assert_close(y, model(x))
    assert len(wanted) == 2


def test_an_ordinary_machine_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "faster", lambda dtype: False)
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.randn(20, 8, dtype=dtype), torch.randn(4, 8, dtype=dtype)
        assert torch.equal(products.linear(x, weight), torch.nn.functional.linear(x, weight))
