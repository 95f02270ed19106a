from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme
from bitpress.kernels.weights.base import WeightDescription
from bitpress.kernels.weights.integer import Integer

Make = Callable[..., QTensor]

TYPES = [
    Integer(bits, group, symmetric) for bits in (2, 3, 4, 8) for group in (None, 32) for symmetric in (True, False)
]
each_type = pytest.mark.parametrize("weight", TYPES, ids=lambda weight: weight.name)


def of(weight: Integer, shape: tuple[int, int], tensors: dict[str, Tensor]) -> QTensor:
    return QTensor.of(Scheme(weight), shape, tensors)


@each_type
def test_name_and_description_round_trip(weight: Integer) -> None:
    assert Integer.parse(weight.name) == weight
    assert Integer.from_description(weight.description()) == weight


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (WeightDescription("int", 5, "channel"), "int5 is not a scheme"),
        (WeightDescription("int", 4, "channel", 32), "strategy channel does not go with group_size 32"),
        (WeightDescription("int", 4, "group"), "strategy group does not go with group_size None"),
    ],
)
def test_impossible_descriptions(description: WeightDescription, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Integer.from_description(description)


@pytest.mark.parametrize(
    "description",
    [
        WeightDescription("float", 8, "channel"),
        WeightDescription("int", 8, "tensor"),
        WeightDescription("int", 8, "block"),
    ],
)
def test_descriptions_of_other_types(description: WeightDescription) -> None:
    assert Integer.from_description(description) is None


@pytest.mark.parametrize(
    ("name", "in_features", "fitted"),
    [
        ("int4-g128", 576, "int4-g64"),
        ("int4-g128-asym", 96, "int4-g32-asym"),
        ("int4-g96", 64, "int4-g64"),
        ("int4-g128", 48, "int4-g16"),
        ("int4-g128", 256, "int4-g128"),  # nothing is to be fitted
        ("int4-g128", 131, "int4-g128"),  # nothing fits
        ("int4-g128", 24, "int4-g128"),  # groups of 8 would cost 2 bits more per weight
        ("int4-channel", 131, "int4-channel"),
    ],
)
def test_fitted(name: str, in_features: int, fitted: str) -> None:
    assert Scheme.parse(name).fitted((7, in_features)).name == fitted


@each_type
@pytest.mark.parametrize("out_features", [1, 13])
def test_layout_is_what_random_and_nearest_make(generator: torch.Generator, weight: Integer, out_features: int) -> None:
    shape = (out_features, 96)
    of(weight, shape, weight.random(shape, generator)).check()
    of(weight, shape, weight.nearest(torch.randn(shape, generator=generator), torch.float16)).check()
    assert of(weight, shape, weight.random(shape, generator)).dequantize().std() < 3


@each_type
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_nearest_is_nearest(generator: torch.Generator, weight: Integer, scale_dtype: torch.dtype) -> None:
    """No other code is nearer, and no group's range is larger than its weights ask for."""
    dense = torch.randn(5, 64, generator=generator)
    q = of(weight, (5, 64), weight.nearest(dense, scale_dtype))
    groups = dense.double().unflatten(1, (q.scales.shape[1], -1))
    scales = q.scales.double().unsqueeze(-1)
    zeros = weight.middle if q.zeros is None else q.zeros.double().unsqueeze(-1)
    codes = ((groups / scales).round() + zeros).clamp(0, weight.max_code)
    least = ((codes - zeros) * scales - groups).abs().flatten(1)
    assert ((q.dequantize().double() - dense.double()).abs() <= least + 2.0**-20).all()  # float32's rounding
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    spread = 2 * torch.maximum(high, -low) if weight.symmetric else high - low
    torch.testing.assert_close(q.scales.double(), spread / weight.max_code, rtol=2.0**-8, atol=0)  # bfloat16


def test_nearest_of_zeros_is_zero() -> None:
    for weight in TYPES:
        q = of(weight, (2, 32), weight.nearest(torch.zeros(2, 32), torch.float16))
        assert torch.equal(q.scales, torch.ones_like(q.scales))
        assert not q.dequantize().any()


@each_type
def test_rows(make_qtensor: Make, weight: Integer) -> None:
    q = make_qtensor(weight.name, 13, 96)
    ids = torch.tensor([12, 0, 12])
    assert torch.equal(q.rows(ids).dequantize(), q.dequantize()[ids])
    q.rows(ids).check()


@each_type
def test_elements_round_trip(make_qtensor: Make, weight: Integer) -> None:
    q = make_qtensor(weight.name, 5, 96)
    tensors = dict(q.tensors())
    elements, scales, zeros = weight.elements(q.shape, tensors)
    assert elements.dtype == torch.int8
    shift = 0 if zeros is None else zeros.float().unsqueeze(-1)
    groups = elements.float().unflatten(1, (scales.shape[1], -1))
    assert torch.equal(((groups - shift) * scales.unsqueeze(-1)).flatten(1), q.dequantize())
    back = weight.from_elements(q.shape, elements, scales, zeros)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_elements_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"elements -8\.\.8 are out of range -8\.\.7"):
        Integer(4).from_elements((1, 2), torch.tensor([[8, -8]], dtype=torch.int8), torch.ones(1, 1), None)
    with pytest.raises(ValueError, match=r"dtype torch\.float32, expected torch\.int8"):
        Integer(8).from_elements((1, 2), torch.ones(1, 2), torch.ones(1, 1), None)
