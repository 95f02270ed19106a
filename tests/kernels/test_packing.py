import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress.kernels.packing import pack, unpack, words


def stream_words(codes: list[int], bits: int) -> list[int]:
    """The slow way: one Python integer, cut into words."""
    stream = sum(code << (bits * place) for place, code in enumerate(codes))
    unsigned = [stream >> (32 * i) & 0xFFFFFFFF for i in range(words(len(codes), bits))]
    return [word - (1 << 32) if word >> 31 else word for word in unsigned]


rows = st.sampled_from((2, 3, 4, 8)).flatmap(
    lambda bits: st.tuples(
        st.just(bits),
        st.integers(1, 70).flatmap(
            lambda n: st.lists(
                st.lists(st.integers(0, (1 << bits) - 1), min_size=n, max_size=n), min_size=1, max_size=3
            )
        ),
    )
)


@settings(max_examples=150, deadline=None)
@given(rows)
def test_round_trip_and_words(case: tuple[int, list[list[int]]]) -> None:
    bits, matrix = case
    codes = torch.tensor(matrix, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.tolist() == [stream_words(row, bits) for row in matrix]
    assert torch.equal(unpack(packed, bits, codes.shape[1]), codes)


def test_three_bit_words_by_hand() -> None:
    """Codes 10 and 21 straddle words: 32 codes of 3 bits are 3 words."""
    codes = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7] * 4, dtype=torch.uint8)
    # The 24 bits of 0..7, the lowest first, are the bytes 0x88, 0xC6, 0xFA.
    data = bytes([0x88, 0xC6, 0xFA] * 4)
    expected = [int.from_bytes(data[i : i + 4], "little", signed=True) for i in (0, 4, 8)]
    assert pack(codes, 3).tolist() == expected
    assert expected[0] == 0x88FAC688 - (1 << 32)


@pytest.mark.parametrize(("bits", "word"), [(2, 0x55555555), (4, 0x11111111), (8, 0x01010101)])
def test_ones(bits: int, word: int) -> None:
    assert pack(torch.ones(32 // bits, dtype=torch.uint8), bits).tolist() == [word]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_leading_dimensions_and_strides(bits: int, generator: torch.Generator) -> None:
    codes = torch.randint(0, 1 << bits, (2, 37, 3), dtype=torch.uint8, generator=generator).transpose(1, 2)
    packed = pack(codes, bits)
    assert packed.shape == (2, 3, words(37, bits))
    assert torch.equal(unpack(packed, bits, 37), codes)
    assert torch.equal(unpack(packed.transpose(0, 1), bits, 37), codes.transpose(0, 1))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dimensions_of_size_one(bits: int) -> None:
    """One word per row, transposed from a matrix of one row: contiguous to PyTorch, in spite of its stride."""
    codes = torch.tensor([[1], [2], [3]], dtype=torch.uint8)
    packed = pack(codes, bits).flatten().view(1, 3).t()
    assert packed.stride() == (1, 3)
    assert torch.equal(unpack(packed, bits, 1), codes)
    assert torch.equal(pack(codes.flatten().view(1, 3).t(), bits), packed)
