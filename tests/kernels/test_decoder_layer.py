"""The native decoder layer against the same formulas in torch, on every instruction set that this machine has."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bitpress.kernels.cpu.library import library
from bitpress.kernels.cpu.native import NativeExact, NativeInt8, NativeInt16
from bitpress.kernels.decoder_layer import Context, Experts, NativeLayer, NativeLayers, Norm, Parts, coding
from bitpress.kernels.kv_cache import cache_examples, parse_cache, rounded
from bitpress.kernels.linear import QLinear
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.registry import Selection

FOUND = library()
INSTRUCTIONS = [] if isinstance(FOUND, str) else FOUND.runnable
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROOM = 5  # beyond what is filled

pytestmark = pytest.mark.skipif(isinstance(FOUND, str), reason=str(FOUND))

MakeParts = Callable[..., Parts]


@pytest.fixture
def make_parts(make_qtensor: Callable[..., QTensor], generator: torch.Generator) -> MakeParts:
    """make_parts(heads=4, ...): a random layer; everything that is optional in a Llama's where `extras`."""

    def make(
        heads: int = 4,
        key_heads: int = 2,
        dim: int = 16,
        hidden: int = 64,
        inner: int = 96,
        extras: bool = False,
        kernel: NativeInt8 | None = None,
        fused: bool = False,
        gated: bool = True,
        around: str = "attention, mlp",
        centered: bool = False,
        activation: str | None = None,
        cap: float | None = None,
        experts: int = 0,
        shared: bool = False,
        scheme: str = "int4-g32",
    ) -> Parts:
        def linear(out_features: int, in_features: int) -> QLinear:
            qtensor = make_qtensor(scheme, out_features, in_features)
            qtensor = replace(qtensor, scales=qtensor.scales / in_features**0.5)
            if extras:
                order = torch.randperm(in_features, generator=generator).to(torch.int32)
                qtensor = replace(qtensor, order=order)
            bias = torch.randn(out_features, generator=generator).to(torch.bfloat16) if extras else None
            layer = QLinear(qtensor, bias, torch.float32, "auto" if qtensor.scheme.activations else "native-bf16")
            layer.selection = Selection(kernel or NativeExact(), {})
            layer.packed.instructions = layer.selection.kernel.chosen()
            return layer

        def norm(features: int) -> Norm:
            weight = torch.randn(features, generator=generator)
            bias = torch.randn(features, generator=generator) if centered else None
            return Norm(weight, 1e-3, bias, centered)

        def mlp() -> tuple[QLinear, QLinear | None, QLinear]:
            up = linear(inner, hidden) if gated and not fused else None
            return linear(inner * (2 if gated and fused else 1), hidden), up, linear(hidden, inner)

        queries, keys = heads * dim, key_heads * dim
        shapes: list[tuple[int, int] | None] = [(queries, hidden), (keys, hidden), (keys, hidden)]
        if fused:
            shapes = [(queries + 2 * keys, hidden), None, None]
        attention = [shape and linear(*shape) for shape in (*shapes, (hidden, queries))]
        of_heads = (norm(dim), norm(dim)) if extras else (None, None)
        places = ("attention", "after attention", "mlp", "after mlp")
        norms = (*(norm(hidden) if place in around.split(", ") else None for place in places), *of_heads)
        routed = None
        if experts:
            router = torch.randn(experts, hidden, generator=generator)
            gate = torch.randn(hidden, generator=generator) if shared else None
            routed = Experts(router, 2, not shared, tuple(mlp() for _ in range(experts)), gate)
        own = mlp() if shared or not experts else (None, None, None)
        activation = activation or ("gelu_tanh" if extras else "silu")
        return Parts((*attention, *own), norms, heads, key_heads, dim, 0.3, activation, cap, routed)

    return make


def normed(x: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return x
    if norm.centered:
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    features = cos.shape[-1]
    low, high = x[..., :features].chunk(2, -1)
    return torch.cat([x[..., :features] * cos + torch.cat([-high, low], -1) * sin, x[..., features:]], -1)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "gelu": F.gelu, "relu": F.relu
}  # fmt: skip


def through(mlp: Sequence[QLinear | None], activation: str, h: Tensor) -> Tensor:
    """What gate, up and down make of h."""
    gate, up, down = mlp
    assert gate is not None
    assert down is not None
    a = gate(h)
    b: Tensor | float = 1.0 if up is None else up(h)
    if gate.out_features == 2 * down.in_features:
        a, b = a.chunk(2, -1)
    return down(ACTIVATIONS[activation](a) * b)


def expected(
    parts: Parts,
    x: Tensor,
    rotation: list[Tensor],
    keys: Tensor,
    values: Tensor,
    first: Tensor | None = None,
    window: int | None = None,
    through_cache: Callable[[Tensor], Tensor] = lambda states: states,
) -> tuple[Tensor, Tensor, Tensor]:
    """In float32 the output [batch, count, hidden], and keys and values [batch, key_heads, length + count, dim].

    Args:
        through_cache: what the cache makes of keys and values.
    """
    q, k, v, o = parts.linears[:4]
    assert q is not None
    assert o is not None
    cos, sin = (table.float().unsqueeze(1) for table in rotation)
    (batch, count), dtype, x = x.shape[:2], x.dtype, x.float()

    def heads(projected: Tensor) -> Tensor:
        return projected.view(batch, count, -1, parts.dim).transpose(1, 2)

    h = normed(x, parts.norms[0])
    sizes = [parts.heads * parts.dim, *[parts.key_heads * parts.dim] * 2]
    projected = q(h).split(sizes, -1) if k is None or v is None else (q(h), k(h), v(h))
    query = rotated(normed(heads(projected[0]), parts.norms[4]), cos, sin)
    key = rotated(normed(heads(projected[1]), parts.norms[5]), cos, sin)
    length = keys.shape[2]
    keys = torch.cat([keys, through_cache(key.to(dtype))], 2).float()
    values = torch.cat([values, through_cache(heads(projected[2]).to(dtype))], 2).float()
    places = torch.arange(length + count)
    seen = (places <= places[length:].unsqueeze(1)).expand(batch, 1, -1, -1)
    if first is not None:
        seen = seen & (places >= first.view(-1, 1, 1, 1))
    if window is not None:
        seen = seen & (places > places[length:].unsqueeze(1) - window)
    group = parts.heads // parts.key_heads
    scores = query @ keys.repeat_interleave(group, 1).transpose(2, 3) * parts.scale
    if parts.cap is not None:
        scores = parts.cap * torch.tanh(scores / parts.cap)
    weights = scores.masked_fill(~seen, -1e30).softmax(-1)
    mixed = weights @ values.repeat_interleave(group, 1)
    x = x + normed(o(mixed.transpose(1, 2).reshape(batch, count, -1)), parts.norms[1])
    h = normed(x, parts.norms[2])
    routed, own = parts.experts, parts.linears[4:]
    y = torch.zeros_like(h) if own[0] is None else through(own, parts.activation, h)
    if routed is not None:
        if routed.shared_gate is not None:
            y = y * (h @ routed.shared_gate).sigmoid().unsqueeze(-1)
        shares = (h @ routed.router.t()).softmax(-1)
        top = shares.topk(routed.active, -1)
        kept = torch.zeros_like(shares).scatter(-1, top.indices, top.values)
        kept = kept / kept.sum(-1, keepdim=True) if routed.renormalized else kept
        for number, mlp in enumerate(routed.linears):
            y = y + kept[..., number : number + 1] * through(mlp, parts.activation, h)
    return x + normed(y, parts.norms[3]), keys, values


def inputs(
    parts: Parts, length: int, dtype: torch.dtype, batch: int = 1, count: int = 1, rotated: int | None = None
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """x, [cos, sin], and keys and values with room, which is NaN."""
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(batch, count, parts.hidden, generator=generator).to(dtype)
    angles = torch.rand(batch, count, rotated or parts.dim, generator=generator) * 6
    keys = torch.full((2, batch, parts.key_heads, length + count + ROOM - 1, parts.dim), torch.nan).to(dtype)
    keys[:, :, :, :length] = torch.randn(2, batch, parts.key_heads, length, parts.dim, generator=generator).to(dtype)
    return x, [angles.cos().to(dtype), angles.sin().to(dtype)], keys[0], keys[1]


def one(parts: Parts) -> NativeLayers:
    return NativeLayers([NativeLayer(parts)])


def context(rotation: list[Tensor], keys: Tensor, values: Tensor) -> list[Context]:
    return [Context({"codes": keys}, {"codes": values}, (rotation[0], rotation[1]))]


def check(
    parts: Parts,
    length: int,
    dtype: torch.dtype,
    tolerance: float,
    batch: int = 1,
    count: int = 1,
    first: list[int] | None = None,
    window: int | None = None,
    rotated: int | None = None,
) -> None:
    """What NativeLayer computes is what torch does, and it touches no other place of the cache.

    Args:
        window: the cache then begins with the first token that is seen.
    """
    x, rotation, keys, values = inputs(parts, length, dtype, batch, count, rotated)
    starts = None if first is None else torch.tensor(first)
    want, all_keys, all_values = expected(
        parts, x, rotation, keys[:, :, :length], values[:, :, :length], starts, window
    )
    begin = 0 if window is None else max(0, length + 1 - window)
    left = (keys[:, :, begin:].contiguous(), values[:, :, begin:].contiguous())
    own = Context({"codes": left[0]}, {"codes": left[1]}, (rotation[0], rotation[1]), begin, window)
    got = one(parts).step(x, [own], length, starts)
    keys[:, :, begin:], values[:, :, begin:] = left
    assert got.dtype == dtype
    end = length + count
    for sequence in range(batch):
        real = 0 if first is None else max(0, first[sequence] - length)  # tokens before are padding
        for name, a, b in (
            ("output", got[sequence, real:], want[sequence, real:]),
            ("keys", keys[sequence, :, :end], all_keys[sequence]),
            ("values", values[sequence, :, :end], all_values[sequence]),
        ):
            error = ((a.float() - b).abs().max() / b.abs().max()).item()
            assert error <= tolerance + torch.finfo(dtype).eps, f"{name} of sequence {sequence}: {error}"
    assert got.isfinite().all()
    assert keys[:, :, end:].isnan().all()
    assert values[:, :, end:].isnan().all()


# Sums of a few hundred float32 products in another order; what is stored is rounded to the dtype besides.
EXACT = 1e-5


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [0, 1, 3, 15, 16, 17, 63, 64, 130])
def test_lengths_and_dtypes(
    length: int, dtype: torch.dtype, instructions: str, make_parts: MakeParts, poisoned_empty: None
):
    check(make_parts(kernel=NativeExact(instructions)), length, dtype, EXACT)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize(
    "shape",
    [(2, 2, 16), (4, 4, 16), (10, 2, 16), (6, 2, 32), (2, 1, 48), (8, 1, 32), (14, 2, 64), (2, 1, 128)],
    ids=str,
)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "extras"])
def test_heads_biases_norms_and_orders(
    shape: tuple[int, int, int], extras: bool, instructions: str, make_parts: MakeParts
):
    heads, key_heads, dim = shape
    parts = make_parts(heads, key_heads, dim, extras=extras, kernel=NativeExact(instructions))
    check(parts, 33, torch.float32, EXACT)


@pytest.mark.parametrize("hidden", [32, 96, 160])
@pytest.mark.parametrize("inner", [32, 224])
def test_widths(hidden: int, inner: int, make_parts: MakeParts):
    check(make_parts(hidden=hidden, inner=inner), 7, torch.bfloat16, EXACT)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize(
    ("batch", "count", "length", "first"),
    [
        (1, 2, 0, None), (1, 7, 3, None), (1, 64, 0, None), (1, 65, 63, None), (1, 131, 64, None), (3, 1, 17, None),
        (2, 5, 0, [0, 3]), (3, 1, 33, [0, 5, 33]), (2, 70, 10, [9, 40]), (2, 37, 0, [36, 1]), (300, 2, 1, None),
    ],
    ids=str,
)  # fmt: skip
def test_many_tokens_and_sequences(
    batch: int,
    count: int,
    length: int,
    first: list[int] | None,
    instructions: str,
    make_parts: MakeParts,
    poisoned_empty: None,
):
    """Chunks of a prompt from any place on, and sequences that begin at their own places."""
    for kernel, tolerance in ((NativeExact(instructions), EXACT), (NativeInt16(instructions), 1e-4)):
        check(make_parts(kernel=kernel), length, torch.float32, tolerance, batch, count, first)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("shape", [(5, 1, 64), (4, 2, 48)], ids=str)
@pytest.mark.parametrize("name", [*cache_examples(), "int8-g16", "int4-g2"])
def test_keys_and_values_are_read_as_the_cache_rounds_them(
    name: str, shape: tuple[int, int, int], instructions: str, make_parts: MakeParts, poisoned_empty: None
):
    """What each type's own encode and decode make of them, for one token and many; codes beside these stay."""
    _, key_heads, dim = shape
    kind = parse_cache(name)
    how = coding(kind, dim)
    if kind.problems(dim):
        assert isinstance(how, str)
        return
    assert not isinstance(how, str)
    parts = make_parts(*shape, kernel=NativeExact(instructions))
    scale = None if kind.dynamic else kind.scale(torch.linspace(1, 3, key_heads))
    for batch, count, length, window in (
        (1, 1, 0, None),
        (2, 1, 300, None),
        (2, 37, 29, None),
        (1, 1, 90, 33),
        (1, 70, 90, 9),
    ):
        x, rotation, *states = inputs(parts, length, torch.float32, batch, count)
        past = [rounded(kind, each[:, :, :length], scale) for each in states]
        want, *all_states = expected(
            parts,
            x,
            rotation,
            past[0],
            past[1],
            window=window,
            through_cache=lambda states: rounded(kind, states, scale),
        )
        begin, both = 0 if window is None else max(0, length + 1 - window), []
        for each in states:
            codes = dict(kind.encode(each[:, :, begin:].nan_to_num(0.25), scale))  # 0.25: of the places beyond
            if scale is not None:
                codes["scales"] = scale.flatten().expand(batch, key_heads).clone()
            both.append(codes)
        before = [{key: each.clone() for key, each in codes.items()} for codes in both]
        context = Context(both[0], both[1], (rotation[0], rotation[1]), begin, window, how)
        got = one(parts).step(x, [context], length)
        error = ((got - want).abs().max() / want.abs().max()).item()
        assert error < 1e-3, error  # queries and weights of 16 bits
        for codes, was, right in zip(both, before, all_states):
            now = kind.decode(codes, scale)[:, :, : length + count - begin]
            close = now.isclose(right[:, :, begin:], rtol=1e-3, atol=1e-4)
            assert close.float().mean() > 0.999  # a last bit turns one over that lies between two codes
            for key, each in codes.items():
                if each.dim() == 4:
                    same = each.view(torch.uint8) == was[key].view(torch.uint8)
                    assert same[:, :, : length - begin].all()
                    assert same[:, :, length + count - begin :].all()


@pytest.mark.parametrize("name", ["int8", "int8-g16", "fp8", "int4-g16"])
def test_a_key_that_is_not_a_number_shows(name: str, make_parts: MakeParts):
    """In its own sequence, also later, when it is long past; in no other."""
    parts, kind = make_parts(), parse_cache(name)
    how, scale = coding(kind, 16), None if kind.dynamic else kind.scale(torch.ones(2))
    assert not isinstance(how, str)
    x, rotation, *states = inputs(parts, 0, torch.float32, batch=2, count=4)
    both = [dict(kind.encode(each.nan_to_num(), scale)) for each in states]
    for codes in both if scale is not None else []:
        codes["scales"] = scale.flatten().expand(2, 2).clone()
    native = one(parts)
    for place in range(4):
        token = x[:, place : place + 1].clone()
        token[0, 0, 3] = torch.nan if place == 1 else 0
        tables = (rotation[0][:, place : place + 1].contiguous(), rotation[1][:, place : place + 1].contiguous())
        y = native.step(token, [Context(both[0], both[1], tables, coding=how)], place)
        assert y[1].isfinite().all()
        assert y[0].isfinite().all() == (place < 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(10, 2, 16), (6, 2, 32), (2, 1, 48), (14, 2, 64), (2, 1, 256)], ids=str)
def test_heads_of_many_tokens(shape: tuple[int, int, int], dtype: torch.dtype, make_parts: MakeParts):
    parts = make_parts(*shape, extras=True)
    check(parts, 5, dtype, EXACT, batch=2, count=40, first=[0, 7])


KINDS: dict[str, dict[str, Any]] = {
    "phi": {"fused": True},
    "gemma": {"around": "attention, after attention, mlp, after mlp", "cap": 2.0, "activation": "gelu_tanh"},
    "gpt": {"fused": True, "gated": False, "centered": True, "activation": "gelu", "extras": True},
    "relu after": {"around": "after attention, after mlp", "gated": False, "activation": "relu"},
    "mixtral": {"experts": 5},
    "qwen-moe": {"experts": 3, "shared": True, "fused": True},
}
SHAPES = [(1, 1, 20, None, None), (1, 1, 20, 7, None), (2, 37, 0, None, [0, 9]), (1, 150, 40, 70, None),
          (2, 70, 90, 3, [0, 120]), (3, 1, 90, 33, [0, 80, 5])]  # fmt: skip


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_layers_and_windows(kind: str, instructions: str, make_parts: MakeParts, poisoned_empty: None):
    parts = make_parts(kernel=NativeExact(instructions), **KINDS[kind])
    assert parts.unsupported() is None
    for batch, count, length, window, first in SHAPES:
        check(parts, length, torch.float32, EXACT, batch, count, first, window, rotated=8)


def test_more_tokens_than_are_taken_at_once(make_parts: MakeParts):
    """A chunk of 512, then one of 512, then a single token, whose attention is another program."""
    check(make_parts(), 3, torch.float32, 1e-4, count=1025)  # rotated by angles that float32 knows to 1e-5
    check(make_parts(experts=3), 3, torch.float32, 1e-4, count=1025, window=100)


def test_sequences_do_not_depend_on_their_company(make_parts: MakeParts):
    """The same bits alone and beside others, wherever padding puts them."""
    native = one(make_parts(kernel=NativeInt16()))
    x, rotation, keys, values = inputs(native.layers[0].parts, 0, torch.float32, count=70)
    alone = native.step(x, context(rotation, keys, values), 0)
    wide, tables, more_keys, more_values = inputs(native.layers[0].parts, 0, torch.float32, batch=3, count=90)
    wide[1, 20:], tables[0][1, 20:], tables[1][1, 20:] = x[0], rotation[0][0], rotation[1][0]
    first = torch.tensor([3, 20, 50])
    beside = native.step(wide, context(tables, more_keys, more_values), 0, first)
    assert torch.equal(beside[1, 20:], alone[0])


def test_with_quantized_inputs(make_parts: MakeParts):
    """A difference in the last bit may round an input's code to its neighbour: 1/127 of the largest in its group."""
    check(make_parts(kernel=NativeInt8()), 20, torch.float32, 1e-2)
    check(make_parts(kernel=NativeInt16()), 20, torch.float32, 1e-4)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("scheme", ["int8-dynamic-asym", "int8-static", "int8-static-asym"])
def test_with_a_range_of_inputs_for_each_layer(scheme: str, instructions: str, make_parts: MakeParts):
    """q, k and v read the same inputs by ranges of their own; gate and up by one."""
    parts = make_parts(kernel=NativeInt8(instructions), scheme=scheme)
    gate, up = (parts.linears[number].packed.data for number in (4, 5))
    inputs_at = gate[:128].view(torch.int64)[14]
    up[inputs_at : inputs_at + 4] = gate[inputs_at : inputs_at + 4]
    check(parts, 20, torch.float32, 2e-2)
    check(parts, 3, torch.float32, 2e-2, count=40)


def test_each_linear_layer_has_its_own_inputs(make_parts: MakeParts):
    """A layer whose scheme quantizes its inputs, among others whose inputs stay as they are."""
    parts = make_parts()
    mixed = NativeInt8(), *[NativeExact()] * 6
    for layer, kernel in zip(parts.all_linears(), mixed):
        layer.selection = Selection(kernel, {})
    check(parts, 20, torch.float32, 1e-2)
    x, rotation, keys, values = inputs(parts, 20, torch.float32)
    one(parts).step(x, context(rotation, keys, values), 20)
    added = keys[:, :, 20].clone()
    parts.all_linears()[1].selection = Selection(NativeInt8(), {})
    one(parts).step(x, context(rotation, keys, values), 20)
    assert not torch.equal(keys[:, :, 20], added)


def test_layers_in_one_call_are_those_one_after_the_other(make_parts: MakeParts):
    """Then the norm; in float32 nothing is rounded between two calls, so it is the same to the bit."""
    layers = [NativeLayer(make_parts(inner=inner)) for inner in (96, 64)]
    norm = Norm(torch.linspace(0.5, 1.5, layers[0].parts.hidden), 1e-3)
    x, rotation, keys, values = inputs(layers[0].parts, 5, torch.float32, batch=2, count=3)
    second = (keys.flip(0).clone(), values.flip(0).clone())
    caches = [(keys.clone(), values.clone()), (second[0].clone(), second[1].clone())]
    got = NativeLayers(layers, norm).step(x, [context(rotation, *cache)[0] for cache in caches], 5)
    for layer, cache in zip(layers, [(keys, values), second]):
        x = NativeLayers([layer]).step(x, context(rotation, *cache), 5)
    want = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a[:, :, :8], b[:, :, :8]) for a, b in zip(caches[1], second))


@pytest.mark.parametrize("value", [1e4, -1e4])
def test_large_scores_and_activations_stay_finite(value: float, make_parts: MakeParts):
    parts = make_parts()
    x, rotation, keys, values = inputs(parts, 9, torch.float32)
    keys[:, :, 3] = values[:, :, 3] = value
    assert one(parts).step(x, context(rotation, keys, values), 9).isfinite().all()


@pytest.mark.parametrize("length", [40, 600])
@pytest.mark.parametrize("count", [1, 30])
def test_threads_change_nothing(length: int, count: int, make_parts: MakeParts):
    parts = make_parts(heads=8, key_heads=4, dim=64, hidden=256, inner=512)
    outputs = []
    was = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x, rotation, keys, values = inputs(parts, length, torch.bfloat16, count=count)
            outputs.append(one(parts).step(x, context(rotation, keys, values), length))
    finally:
        torch.set_num_threads(was)
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_a_copy_has_its_own_weights(make_parts: MakeParts):
    native = one(make_parts(extras=True))
    copied = copy.deepcopy(native)
    x, rotation, keys, values = inputs(native.layers[0].parts, 4, torch.float32)
    want = native.step(x, context(rotation, keys, values), 4)
    for linear in native.layers[0].linears:
        linear.packed.get_buffer("data")[128:] = 0
    assert torch.equal(copied.step(x, context(rotation, keys, values), 4), want)
    assert not torch.equal(native.step(x, context(rotation, keys, values), 4), want)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dim": 8}, "heads of 8 features; expected a multiple of 16"),
        ({"heads": 3, "key_heads": 2}, "2 heads of keys to 3 of queries"),
    ],
)
def test_reasons(changes: dict[str, int], said: str, make_parts: MakeParts):
    assert make_parts(**changes).unsupported() == said


def test_more_reasons(make_parts: MakeParts):
    parts = make_parts()
    assert parts.unsupported() is None
    wanted = "activation tanh; expected one of silu, gelu_tanh, gelu, relu"
    assert replace(parts, activation="tanh").unsupported() == wanted
    swapped = (*parts.linears[:6], parts.linears[0])
    assert replace(parts, linears=swapped).unsupported() == "linear layers of an MLP that do not fit each other"
    swapped = (parts.linears[6], *parts.linears[1:])
    assert replace(parts, linears=swapped).unsupported() == "linear layers of attention that do not fit each other"
    routed = make_parts(experts=2)
    assert routed.experts is not None
    lost = replace(routed.experts, router=torch.ones(3, 64))
    assert replace(routed, experts=lost).unsupported() == "a router [3, 64] of 2 experts"
    short = (parts.norms[0], None, Norm(torch.ones(63), 1e-3), None, None, None)
    assert replace(parts, norms=short).unsupported() == "norms that do not fit the linear layers"
