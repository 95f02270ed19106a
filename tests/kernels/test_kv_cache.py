"""Cache types against formulas of their own: E4M3's values searched one by one, integers in plain loops."""

import math

import pytest
import torch
from torch import Tensor

from bitpress.kernels.caches.groups import IntegerGroups
from bitpress.kernels.kv_cache import bytes_per_token, cache_examples, described_cache, parse_cache, rounded

# sign, exponent, mantissa: 2^(e - 7) * (1 + m / 8), and m / 8 * 2^-6 where e is 0; the code of all ones is NaN
E4M3 = sorted(
    sign * (2.0 ** (e - 7) * (1 + m / 8) if e else m / 8 * 2.0**-6)
    for sign in (-1, 1)
    for e in range(16)
    for m in range(8)
    if (e, m) != (15, 7)
)


def states(heads: int = 3, tokens: int = 5, dim: int = 64) -> Tensor:
    """[2, heads, tokens, dim]; heads differ in size."""
    noise = torch.randn(2, heads, tokens, dim, generator=torch.Generator().manual_seed(0))
    return noise * torch.tensor([0.01, 1.0, 30.0])[:heads].view(1, -1, 1, 1)


def peaks(x: Tensor) -> Tensor:
    return x.abs().amax((0, 2, 3))


@pytest.mark.parametrize(("name", "shape"), [("fp8", (1,)), ("fp8-head", (3, 1, 1))])
def test_fp8_takes_the_nearest_value(name: str, shape: tuple[int, ...]) -> None:
    cache, x = parse_cache(name), states(tokens=2, dim=8)
    scale = cache.scale(peaks(x))
    expected_scale = peaks(x) / 448 if len(shape) > 1 else peaks(x).max() / 448
    assert scale.shape == shape
    assert torch.equal(scale.flatten(), expected_scale.flatten())
    result, grid = rounded(cache, x, scale), torch.tensor(E4M3, dtype=torch.float64)
    spread = scale.to(torch.float64).expand(3, 1, 1) if len(shape) > 1 else scale.to(torch.float64)
    distances = (x.to(torch.float64).unsqueeze(-1) - spread.unsqueeze(-1) * grid).abs().amin(-1)
    found = (x.to(torch.float64) - result.to(torch.float64)).abs()
    assert (found <= distances + 1e-6 * x.abs()).all()  # x / S and S times the code are float32
    assert rounded(cache, 4 * x, scale).abs().max() <= 448 * scale.max()  # what was not seen in calibration is clamped


def test_int8_has_a_scale_for_each_head() -> None:
    cache, x = parse_cache("int8"), states()
    scale = cache.scale(peaks(x))
    assert scale.flatten().tolist() == pytest.approx([peak / 127 for peak in peaks(x).tolist()])
    result = rounded(cache, x, scale)
    for head in range(3):
        step = scale[head].item()
        for value, found in zip(x[:, head].flatten().tolist(), result[:, head].flatten().tolist()):
            assert found == pytest.approx(step * max(-128, min(127, round(value / step))), abs=1.001 * step * 1e-4)
    assert not parse_cache("int8").dynamic


@pytest.mark.parametrize(("bits", "size", "dim"), [(8, 64, 64), (4, 64, 128), (4, 32, 64), (8, 2, 6)])
def test_groups_of_a_token_have_their_own_scale(bits: int, size: int, dim: int) -> None:
    cache, x, largest = IntegerGroups(bits, size), states(dim=dim), (1 << (bits - 1)) - 1
    result = rounded(cache, x, None)
    for own, found in zip(x.reshape(-1, size).tolist(), result.reshape(-1, size).tolist()):
        step = torch.tensor(max(map(abs, own)) / largest).to(torch.float16).item()
        nearest = [step * max(-largest, min(largest, round(value / step))) for value in own]
        assert found == pytest.approx(nearest, rel=1e-6, abs=1e-12)
    tokens = [rounded(cache, x[:, :, place : place + 1], None) for place in range(x.shape[2])]
    assert torch.equal(torch.cat(tokens, 2), result)  # a token's codes do not depend on the others


@pytest.mark.parametrize("name", cache_examples())
def test_every_type(name: str) -> None:
    cache, x = parse_cache(name), states()
    assert cache.name == name
    assert described_cache(cache.description()) == cache
    scale = None if cache.dynamic else cache.scale(torch.zeros(3))
    assert not rounded(cache, torch.zeros_like(x), scale).any()
    x[0, 0, 0, 0] = math.nan
    result = rounded(cache, x.to(torch.bfloat16), scale)
    assert result.dtype == torch.bfloat16
    assert result[0, 0, 0, 0].isnan()


@pytest.mark.parametrize(
    ("name", "nbytes"), [("fp8", 128), ("fp8-head", 128), ("int8", 128), ("int8-g64", 132), ("int4-g64", 68)]
)
def test_bytes_of_a_token(name: str, nbytes: int) -> None:
    """Two heads of 64 features."""
    assert bytes_per_token(parse_cache(name), 2, 64) == nbytes


def test_what_is_no_type() -> None:
    with pytest.raises(ValueError, match=r"'fp9' is no type of cache; use fp8 or fp8-head, int8, int8-gN or int4-gN"):
        parse_cache("fp9")
    with pytest.raises(ValueError, match="3 bits; a cache in groups has 4 or 8"):
        parse_cache("int3-g64")
    assert "heads of 80 features are no whole groups of 64" in parse_cache("int4-g64").problems(80)[0]
    described = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}  # dynamic is false unsaid
    assert described_cache(described) == parse_cache("fp8")
    for other in ({"dynamic": True}, {"symmetric": False}, {"num_bits": 4}, {"strategy": "channel"}):
        assert described_cache(described | other) is None
