import pytest
import torch

from bitpress.kernels.activations.int8_token import Int8Token, quantize_rows


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


@pytest.mark.parametrize("rows", [1, 13, 0])
def test_apply_moves_a_value_by_half_a_code_at_most(generator: torch.Generator, rows: int) -> None:
    x = torch.randn(rows, 65, generator=generator)
    rounded = Int8Token().apply(x, {})
    assert rounded.dtype == torch.float32
    assert ((rounded - x).abs() <= x.abs().amax(-1, keepdim=True) / 254 * (1 + 2.0**-20)).all()  # float32's rounding


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
