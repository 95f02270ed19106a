from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bitpress.kernels.packing import unpack
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme
from bitpress.kernels.weights.nf4 import NF4_CODEBOOK

Make = Callable[..., QTensor]


def one_by_one(q: QTensor) -> Tensor:
    """The weight, an element at a time."""
    out_features, in_features = q.shape
    weight = torch.zeros(q.shape, dtype=torch.float64)
    for row in range(out_features):
        for column in range(in_features):
            if q.scheme.weight.description().type == "codebook":
                place = row * in_features + column
                byte, block = int(q.codes[place // 2]), place // 64
                code = byte & 15 if place % 2 else byte >> 4
                scale = float(q.scales[block])
                if q.extra:
                    unit = float(q.extra["nested.codebook"][int(q.scales[block])])
                    scale = unit * float(q.extra["nested.absmax"][block // 256]) + float(q.extra["nested.offset"])
                weight[row, column] = NF4_CODEBOOK[code] * scale
            else:
                code = int(unpack(q.codes, q.scheme.bits, in_features)[row, column])
                group = column // q.scheme.group_size if q.scheme.group_size else 0
                zero = q.scheme.middle if q.zeros is None else int(q.zeros[row, group])
                place = column if q.order is None else int(q.order[column])
                weight[row, place] = float(q.scales[row, group]) * (code - zero)
    return weight


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("int2-g32", (3, 64)),
        ("int3-g32-asym", (1, 96)),
        ("int3-channel", (5, 31)),
        ("int4-channel-asym", (2, 1)),
        ("int4-g16", (3, 48)),
        ("int8-g32-asym", (2, 64)),
        ("int8-dynamic", (7, 13)),
        ("nf4", (1, 1)),
        ("nf4", (7, 11)),
        ("nf4-dq", (3, 65)),
        ("nf4-dq", (257, 64)),
    ],
)
def test_dequantize_is_what_the_docstring_says(make_qtensor: Make, name: str, shape: tuple[int, int]) -> None:
    q = make_qtensor(name, *shape)
    q.check()
    torch.testing.assert_close(q.dequantize().double(), one_by_one(q), rtol=2**-22, atol=2**-22)  # float32's rounding
    assert torch.equal(q.dequantize(torch.bfloat16), q.dequantize().to(torch.bfloat16))


@pytest.mark.parametrize(("name", "in_features"), [("int3-g32-asym", 96), ("int4-g32", 64), ("int8-channel", 31)])
def test_an_order_is_undone(make_qtensor: Make, generator: torch.Generator, name: str, in_features: int) -> None:
    q = make_qtensor(name, 3, in_features)
    q = replace(q, order=torch.randperm(in_features, generator=generator).to(torch.int32))
    q.check()
    torch.testing.assert_close(q.dequantize().double(), one_by_one(q), rtol=2**-22, atol=2**-22)  # float32's rounding
    assert torch.equal(q.dequantize()[:, q.order], replace(q, order=None).dequantize())
    assert q.nbytes == replace(q, order=None).nbytes + 4 * in_features
    assert q.to("meta").order.device.type == "meta"  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scale_dtypes(make_qtensor: Make, dtype: torch.dtype) -> None:
    q = make_qtensor("int4-g32", 3, 64, dtype)
    q.check()
    torch.testing.assert_close(q.dequantize().double(), one_by_one(q), rtol=2**-22, atol=0)


def test_nbytes_and_to(make_qtensor: Make) -> None:
    q = make_qtensor("int4-g128-asym", 8, 256)
    assert q.nbytes == 8 * 256 // 2 + 8 * 2 * 4 + 8 * 2
    moved = make_qtensor("nf4-dq", 8, 64).to("meta")
    assert {tensor.device.type for _, tensor in moved.tensors()} == {"meta"}
    assert [name for name, _ in moved.tensors()] == [
        "codes", "scales", "nested.absmax", "nested.codebook", "nested.offset",
    ]  # fmt: skip


def with_nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = torch.nan
    return tensor


def with_weight(q: QTensor, **changes: int | bool) -> QTensor:
    """The same tensors, said to be of another weight type."""
    return replace(q, scheme=Scheme(replace(q.scheme.weight, **changes)))  # type: ignore[type-var]


def with_extra(q: QTensor, name: str, tensor: Tensor) -> QTensor:
    return replace(q, extra={**q.extra, name: tensor})


def ordered(*changes: tuple[int, int], dtype: torch.dtype = torch.int32) -> Callable[[QTensor], QTensor]:
    """With the order of the inputs as they are, but for some entries."""

    def spoil(q: QTensor) -> QTensor:
        order = torch.arange(q.shape[1], dtype=dtype)
        for place, value in changes:
            order[place] = value
        return replace(q, order=order)

    return spoil


INT_FAULTS: dict[str, tuple[Callable[[QTensor], QTensor], str]] = {
    "codes shape": (lambda q: replace(q, codes=q.codes[:, :-1]), r"codes has shape \[4, 7\], expected \[4, 8\]"),
    "codes dtype": (lambda q: replace(q, codes=q.codes.long()), "codes has dtype torch.int64, expected torch.int32"),
    "scales shape": (lambda q: replace(q, scales=q.scales.t()), r"scales has shape \[2, 4\], expected \[4, 2\]"),
    "scales dtype": (lambda q: replace(q, scales=q.scales.double()), "scales has dtype torch.float64"),
    "scales nan": (lambda q: replace(q, scales=with_nan(q.scales)), "scales has 1 NaN or infinite values"),
    "scales inf": (lambda q: replace(q, scales=q.scales * torch.inf), "scales has 8 NaN or infinite values"),
    "zeros shape": (lambda q: replace(q, zeros=q.zeros[:, :1]), r"zeros has shape \[4, 1\]"),  # type: ignore[index]
    "zeros dtype": (lambda q: replace(q, zeros=q.zeros.int()), "zeros has dtype torch.int32"),  # type: ignore[union-attr]
    "zeros range": (lambda q: replace(q, zeros=q.zeros | 16), r"out of range 0\.\.15"),  # type: ignore[operator]
    "zeros missing": (lambda q: replace(q, zeros=None), "zeros missing for scheme int4-g32-asym"),
    "group mismatch": (lambda q: with_weight(q, group_size=64), r"expected \[4, 1\]"),
    "group does not divide": (
        lambda q: with_weight(q, group_size=48),
        "not divisible by group_size 48",
    ),
    "zeros extra": (
        lambda q: with_weight(q, symmetric=True),
        "zeros does not belong to scheme int4-g32",
    ),
    "order twice": (ordered((3, 4)), "order is no permutation: 1 of 64 inputs are there more than once"),
    "order range": (ordered((63, 64)), r"order holds 64, which is out of range 0\.\.63"),
    "order negative": (ordered((0, -1)), "order holds -1, which is out of range"),
    "order dtype": (ordered(dtype=torch.int64), "order has dtype torch.int64, expected torch.int32"),
    "order shape": (lambda q: replace(q, order=torch.arange(32, dtype=torch.int32)), r"order has shape \[32\]"),
    "order rank": (
        lambda q: replace(q, order=torch.arange(64, dtype=torch.int32).view(1, -1)),
        r"order has shape \[1, 64\], expected \[64\]",
    ),
    "shape": (lambda q: replace(q, shape=(5, 64)), r"expected \[5, 8\]"),
    "empty": (lambda q: replace(q, shape=(0, 64)), "is empty"),
}


@pytest.mark.parametrize("fault", INT_FAULTS)
def test_check_refuses_integer_faults(make_qtensor: Make, fault: str) -> None:
    good = make_qtensor("int4-g32-asym", 4, 64)
    good.check()
    spoil, message = INT_FAULTS[fault]
    with pytest.raises(ValueError, match=message):
        spoil(good).check()


NF4_FAULTS: dict[str, tuple[Callable[[QTensor], QTensor], str]] = {
    "codes shape": (lambda q: replace(q, codes=q.codes.view(-1, 1)), r"codes has shape \[128, 1\], expected \[128\]"),
    "codes dtype": (lambda q: replace(q, codes=q.codes.view(torch.int8)), "codes has dtype torch.int8"),
    "scales dtype": (
        lambda q: replace(q, scales=q.scales.float()),
        "scales has dtype torch.float32, expected torch.uint8",
    ),
    "nested missing": (lambda q: replace(q, extra={}), "nested.absmax, nested.codebook, nested.offset missing"),
    "nested extra": (
        lambda q: with_weight(q, double_quant=False),
        "does not belong to scheme nf4",
    ),
    "absmax nan": (
        lambda q: with_extra(q, "nested.absmax", with_nan(q.extra["nested.absmax"])),
        "nested.absmax has 1 NaN",
    ),
    "offset shape": (
        lambda q: with_extra(q, "nested.offset", torch.ones(1)),
        r"nested.offset has shape \[1\]",
    ),
    "codebook shape": (
        lambda q: with_extra(q, "nested.codebook", torch.ones(16)),
        "nested.codebook has shape",
    ),
    "zeros extra": (lambda q: replace(q, zeros=torch.zeros(4, 1, dtype=torch.uint8)), "zeros does not belong"),
    "order extra": (ordered(), "order does not belong to scheme nf4-dq"),
}


@pytest.mark.parametrize("fault", NF4_FAULTS)
def test_check_refuses_nf4_faults(make_qtensor: Make, fault: str) -> None:
    good = make_qtensor("nf4-dq", 4, 64)
    good.check()
    spoil, message = NF4_FAULTS[fault]
    with pytest.raises(ValueError, match=message):
        spoil(good).check()
