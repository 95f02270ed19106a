"""Act-order: g_idx on disk, QTensor.order in memory; every permutation there and back, and hostile ones refused."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitpress.kernels.packing import pack
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme
from bitpress.pipeline.formats import registry

Stored = dict[str, Tensor]
OUT, IN = 32, 96
SCHEMES = [f"int{bits}-g32{asym}" for bits in (2, 3, 4, 8) for asym in ("", "-asym")]
GPTQ = [
    (name, scheme) for name in ("gptq", "gptq-v2") for scheme in SCHEMES if name == "gptq-v2" or "asym" not in scheme
]


def make(name: str, seed: int = 0, order: Tensor | None = None) -> QTensor:
    """Random codes, scales, zero points and, unless given, order."""
    scheme, generator = Scheme.parse(name), torch.Generator().manual_seed(seed)
    groups = scheme.groups(IN)

    def draw(*shape: int) -> Tensor:
        return torch.randint(scheme.max_code + 1, shape, dtype=torch.uint8, generator=generator)

    codes = pack(draw(OUT, IN), scheme.bits)
    scales = (torch.rand(OUT, groups, generator=generator) + 0.5).to(torch.float16)
    zeros = None if scheme.symmetric else draw(OUT, groups)
    order = torch.randperm(IN, generator=generator).to(torch.int32) if order is None else order
    return QTensor(scheme, (OUT, IN), codes, scales, zeros, order=order)


def field(words: list[int], place: int, bits: int) -> int:
    """Code number `place` of a bit stream in 32-bit words, lowest bits first."""
    whole = 0
    for number, word in enumerate(words):
        whole |= (word & 0xFFFFFFFF) << (32 * number)
    return whole >> (bits * place) & ((1 << bits) - 1)


def read_slowly(stored: Stored, bits: int, minus: int) -> Tensor:
    """GPTQ's layout, an element at a time: each input feature asks g_idx for its group."""
    weight = torch.zeros(OUT, IN)
    for n in range(OUT):
        column = stored["qweight"][:, n].tolist()
        for k in range(IN):
            group = int(stored["g_idx"][k])
            zero = field(stored["qzeros"][group].tolist(), n, bits) + minus
            weight[n, k] = stored["scales"][group, n].float() * (field(column, k, bits) - zero)
    return weight


@pytest.mark.parametrize(("name", "scheme"), GPTQ)
def test_an_independent_reader_agrees_to_the_bit(name: str, scheme: str) -> None:
    q = make(scheme)
    q.check()
    stored = registry()[name].write(q, torch.float16)
    found = read_slowly(stored, q.scheme.bits, 1 if name == "gptq" else 0)
    assert torch.equal(found, q.dequantize())
    assert not torch.equal(found, replace(q, order=None).dequantize())  # the order tells


@pytest.mark.parametrize(("name", "scheme"), GPTQ)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_reads_what_it_wrote(name: str, scheme: str, seed: int) -> None:
    """What is read may list a group's members in another sequence; the files and the weight are the same to the bit."""
    format, q = registry()[name], make(scheme, seed)
    stored = format.write(q, torch.float16)
    found = format.read(q.scheme, {suffix: tensor.clone() for suffix, tensor in stored.items()})
    found.check()
    assert torch.equal(found.dequantize(), q.dequantize())
    again = format.write(found, torch.float16)
    assert {suffix: tensor.tolist() for suffix, tensor in again.items()} == {s: t.tolist() for s, t in stored.items()}


@pytest.mark.parametrize("name", ["gptq", "gptq-v2"])
def test_groups_in_order_need_no_order(name: str) -> None:
    q = make("int4-g32", order=torch.arange(IN, dtype=torch.int32))
    found = registry()[name].read(q.scheme, registry()[name].write(q, torch.float16))
    assert found.order is None
    assert torch.equal(found.dequantize(), q.dequantize())
    channel = replace(q, scheme=Scheme.parse("int4-channel"), scales=q.scales[:, :1], order=None)
    stored = registry()[name].write(channel, torch.float16)
    assert not stored["g_idx"].any()  # one group: whatever the order was, it is gone
    assert registry()[name].read(channel.scheme, stored).order is None


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compressed_tensors_of_old(scheme: str) -> None:
    """actorder "group": codes as in the model, and weight_g_idx says which column of the scales is whose."""
    q, packed = make(scheme), registry()["compressed-tensors"]
    stored = packed.write(replace(q, order=None), torch.float16)
    other = registry()["gptq-v2"].write(q, torch.float16)
    stored["weight_packed"], stored["weight_g_idx"] = other["qweight"].t().contiguous(), other["g_idx"]
    found = packed.read(q.scheme, stored)
    found.check()
    assert torch.equal(found.dequantize(), read_slowly(other, q.scheme.bits, 0))


def moved(g_idx: Tensor) -> Tensor:
    """One member of group 0 goes to group 2."""
    g_idx = g_idx.clone()
    g_idx[int((g_idx == 0).nonzero()[0])] = 2
    return g_idx


HOSTILE: list[tuple[Callable[[Tensor], Any], str]] = [
    (lambda g: g + 1, r"holds group 3, which is out of range 0\.\.2 for 96 inputs in groups of 32"),
    (lambda g: g - 1, "holds group -1, which is out of range"),
    (lambda g: g * (1 << 24), "out of range"),
    (lambda g: torch.where(g == 2, torch.iinfo(torch.int32).min, g), "holds group -2147483648"),
    (lambda g: torch.zeros_like(g), "gives group 0 96 members, expected 32"),
    (moved, "gives group 0 31 members, expected 32"),
    (lambda g: g.long(), "dtype torch.int64, expected torch.int32"),
    (lambda g: g.float(), "dtype torch.float32"),
    (lambda g: g.view(2, -1), "dimensions|shape"),
    (lambda g: g[:-32], "out of range|expected"),
    (lambda g: g[:50], "expected|divisible"),
    (lambda g: g[:0], "expected|empty"),
    (lambda g: torch.cat([g, g]), "out of range|members|expected"),
]


@pytest.mark.parametrize(("change", "said"), HOSTILE)
def test_hostile_groups_are_refused(change: Callable[[Tensor], Tensor], said: str) -> None:
    q = make("int4-g32")
    stored = registry()["gptq"].write(q, torch.float16)
    old = registry()["compressed-tensors"].write(replace(q, order=None), torch.float16)
    hostile = change(stored["g_idx"])
    for format, tensors in (
        ("gptq", stored | {"g_idx": hostile}),
        ("compressed-tensors", old | {"weight_g_idx": hostile}),
    ):
        with pytest.raises(ValueError, match=said):
            registry()[format].read(q.scheme, tensors).check()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-4, 6), min_size=0, max_size=24))
def test_any_vector_is_an_order_or_refused(values: list[int]) -> None:
    from bitpress.pipeline.formats.act_order import read_order, write_groups

    scheme, g_idx = Scheme.parse("int4-g4"), torch.tensor(values, dtype=torch.int32)
    whole = len(values) % 4 == 0 and all(values.count(group) == 4 for group in range(len(values) // 4))
    try:
        order = read_order("g_idx", g_idx, scheme)
    except ValueError:
        assert not whole or not values
        return
    if len(values) % 4 or not values:
        assert order is None  # left to QTensor.check, which knows the shape
        return
    assert whole
    assert write_groups(order, len(values), len(values) // 4).tolist() == values


def test_codes_of_a_wrong_shape_are_refused_before_they_are_reordered() -> None:
    q = make("int4-g32")
    for change in (lambda t: t[:-1], lambda t: t.long(), lambda t: t.repeat(2, 1)):
        stored = registry()["gptq"].write(q, torch.float16)
        stored["qweight"] = change(stored["qweight"])
        with pytest.raises(ValueError, match="codes have"):
            registry()["gptq"].read(q.scheme, stored)
