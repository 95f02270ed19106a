import pytest
import torch

from bitpress.kernels.activations.int8_token import (
    Int8Token,
    Int8TokenAsymmetric,
    quantize_rows,
    quantize_rows_asymmetric,
)


def test_quantize_rows() -> None:
    codes, scales = quantize_rows(torch.tensor([[0.0, 0.0], [-254.0, 1.0], [3.0, 5.0]]))
    assert codes.tolist() == [[0, 0], [-127, 0], [76, 127]]  # 1 / 2 rounds to even
    assert scales.flatten().tolist() == [1.0, 2.0, pytest.approx(5 / 127)]


def test_quantize_rows_at_the_edges() -> None:
    x = torch.tensor([[2.7e-43, 0.0], [torch.nan, 1.0], [torch.inf, 1.0], [3.4e38, -3.4e38]])
    before = x.clone()
    codes, scales = quantize_rows(x)
    assert codes[[0, 3]].tolist() == [[0, 0], [127, -127]]
    assert scales[0] == 1
    assert not scales[1:3].isfinite().any()
    assert torch.equal(x.nan_to_num(), before.nan_to_num())  # the input is left alone


def test_asymmetric_rows() -> None:
    """Ranges hold 0, which is exact: those of one sign reach to it."""
    x = torch.tensor([[0.0, 0.0], [-1.0, 254.0], [3.0, 5.0], [-510.0, -4.0]])
    codes, scales, zeros = quantize_rows_asymmetric(x)
    assert scales.flatten().tolist() == [1.0, 1.0, pytest.approx(5 / 255), 2.0]
    assert zeros.flatten().tolist() == [-128, -127, -128, 127]
    assert codes.tolist() == [[-128, -128], [-128, 127], [25, 127], [-128, 125]]
    assert torch.equal((codes.float() - zeros.float())[1] * scales[1], x[1])


def test_asymmetric_rows_at_the_edges() -> None:
    x = torch.tensor([[2.7e-43, 0.0], [torch.nan, 1.0], [torch.inf, 1.0], [-torch.inf, 0.0]])
    before = x.clone()
    codes, scales, zeros = quantize_rows_asymmetric(x)
    assert (codes[0] == zeros[0]).all()
    assert scales[0] == 1
    assert not Int8TokenAsymmetric().apply(x, {})[1:].isfinite().any()
    assert torch.equal(x.nan_to_num(), before.nan_to_num())  # the input is left alone


@pytest.mark.parametrize("rows", [1, 13, 0])
def test_a_massive_input_costs_half_as_much_with_a_zero_point(generator: torch.Generator, rows: int) -> None:
    """Nearly all of the row is on one side of it, and the step is a 255th of the range."""
    x = torch.randn(rows, 65, generator=generator)
    x[:, 7] = 100
    rounded = Int8TokenAsymmetric().apply(x, {})
    assert rounded.dtype == torch.float32
    step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / 255
    assert ((rounded - x).abs() <= step * (0.5 + 2.0**-12)).all()
    assert (step < 100 / 127 * 0.52).all()


@pytest.mark.parametrize("rows", [1, 13, 0])
def test_apply_moves_a_value_by_half_a_code_at_most(generator: torch.Generator, rows: int) -> None:
    x = torch.randn(rows, 65, generator=generator)
    rounded = Int8Token().apply(x, {})
    assert rounded.dtype == torch.float32
    assert ((rounded - x).abs() <= x.abs().amax(-1, keepdim=True) / 254 * (1 + 2.0**-20)).all()  # float32's rounding


def test_each_is_described_apart() -> None:
    for kind, other in ((Int8Token, Int8TokenAsymmetric), (Int8TokenAsymmetric, Int8Token)):
        assert kind.from_description(kind().description()) == kind()
        assert kind.from_description(other().description()) is None


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({}, True),
        ({"observer": None, "group_size": None}, True),
        ({"num_bits": 4}, False),
        ({"dynamic": False}, False),
        ({"strategy": "tensor"}, False),
        ({"symmetric": False}, False),
        ({"type": "float"}, False),
    ],
)
def test_description(changes: dict, known: bool) -> None:
    described = Int8Token.from_description(Int8Token().description() | changes)
    assert described == (Int8Token() if known else None)
