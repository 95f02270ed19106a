"""Calls the kernels of csrc/ with random weights, inputs, strides, threads and values, all between guard pages.

    python tests/fuzz/native_kernels.py [--count 1000] [--minutes 1] [--seed 0] [--first 0] [--sanitized]
    python tests/fuzz/native_kernels.py --seed 0 --first 17 --count 1      one call again

Each buffer ends, or begins, at a page that cannot be touched, so that one byte out of bounds ends the process; the rest
of its own pages is filled with a pattern, which has to be there afterwards. The result is compared with float64. With
--sanitized, the library is built with AddressSanitizer and UndefinedBehaviorSanitizer, and everything runs under them,
AMX emulated.
Each tenth call is a step of a whole decoder layer, on one token or many, of one sequence or several; the one before it
is GPTQ's loop over the columns of a block.
"""

import argparse
import contextlib
import ctypes
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fixtures"))

import torch
from native_inputs import wide_codes
from torch import Tensor
from torch.nn import functional as F

from bitpress.kernels.activations.int8_token import quantize_rows
from bitpress.kernels.cpu import gptq_columns, native
from bitpress.kernels.cpu import library as native_library
from bitpress.kernels.cpu.library import Library, library
from bitpress.kernels.decoder_layer import (
    ACTIVATIONS,
    Context,
    Experts,
    NativeDecoder,
    NativeLayer,
    NativeLayers,
    Norm,
    Parts,
    coding,
)
from bitpress.kernels.kv_cache import parse_cache, rounded
from bitpress.kernels.linear import QLinear
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.registry import Selection
from bitpress.kernels.scheme import Scheme

BATCH = 100  # calls of one process
PATTERN = 0xA5
DTYPES = tuple(native.DTYPES)
BASES = (
    "int2", "int3", "int4", "int8", "int4-asym", "int8-asym", "int8-dynamic", "int8-dynamic-asym",
    "int8-static", "int8-static-asym", "nf4", "nf4-dq", "mxfp4", "nvfp4", "fp8",
    "fp8-b128", "fp8-tensor",
)  # fmt: skip
# RMS, relative to what independent terms would add up to; see tests/kernels/cpu/test_native.py. Outputs are rounded to
# the inputs' dtype, and scales to float16.
BOUND = {torch.float32: 2.0**-10, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-7}
CODEBOOK = 2.0**-6  # NF4's code book in int8
JUMPS = 2.0**-5  # of a rounded cache's codes, at a difference in a key's last bit
KINDS = (native.NativeInt8, native.NativeMixed, native.NativeInt16, native.NativeExact)
TURNS = 10  # one call of so many is a step of a decoder layer, and one a loop over columns
CACHES = ("fp8", "fp8-head", "int8", "int8-g2", "int8-g16", "int8-g32", "int8-g64", "int4-g16", "int4-g32")
LAYER_SCHEMES = (
    "int3-g32", "int4-g32", "int4-g64-asym", "int8-channel", "int8-g128", "int8-dynamic", "int8-dynamic-asym",
    "int8-static", "int8-static-asym", "nf4", "mxfp4", "nvfp4", "fp8",
)  # fmt: skip


class Guarded:
    """Buffers between guard pages, each with a pattern around it."""

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.kept: list[tuple[mmap.mmap, Tensor, int, int]] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, at_end: bool, alignment: int = 1) -> Tensor:
        """A tensor at the end of its pages, as near as `alignment` bytes allow, or at their beginning."""
        page, size = mmap.PAGESIZE, max(1, torch.Size(shape).numel() * dtype.itemsize)
        inner = -(-size // page) * page
        memory = mmap.mmap(-1, inner + 2 * page)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        whole.fill_(PATTERN)
        for offset in (0, page + inner):
            assert self.libc.mprotect(ctypes.c_void_p(whole.data_ptr() + offset), page, 0) == 0
        start = page + ((inner - size) // alignment * alignment if at_end else 0)
        self.kept.append((memory, whole, start, size))
        piece = whole[start : start + size]
        return piece[: torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)

    def copy(self, tensor: Tensor, at_end: bool, alignment: int = 1) -> Tensor:
        """A contiguous copy."""
        result = self.empty(tuple(tensor.shape), tensor.dtype, at_end, alignment)
        return result.copy_(tensor)

    def check(self) -> None:
        """Nothing was written beside a buffer."""
        page = mmap.PAGESIZE
        for _, whole, start, size in self.kept:
            assert (whole[page:start] == PATTERN).all(), "written before a buffer"
            assert (whole[start + size : len(whole) - page] == PATTERN).all(), "written behind a buffer"


@dataclass(frozen=True)
class Call:
    """One call: what is multiplied, how, and what of it lies at the end of its pages."""

    number: int
    seed: int
    scheme: str
    shape: tuple[int, int]
    rows: int
    dtype: torch.dtype
    bias: bool
    kernel: str
    threads: int
    instructions: str
    transposed: bool
    values: str
    at_end: bool


def make_call(number: int, seed: int, runnable: list[str]) -> Call:
    generator = random.Random(f"{seed} {number}")
    base = generator.choice(BASES)
    quantizes_inputs = base.startswith(("int8-dynamic", "int8-static"))
    name, asym, _ = base.partition("-asym")
    columns = generator.choice((1, 2, 7, 31, 32, 33, 64, 127, 200, 509, 640, 1151))
    if base.startswith("nf4"):
        columns, name = 64 * generator.randrange(1, 12), base
    elif base in ("mxfp4", "nvfp4"):
        columns, name = (32 if base == "mxfp4" else 16) * generator.randrange(1, 30), base
    elif base.startswith("fp8") or quantizes_inputs:
        name = base
    else:
        group = generator.choice((32, 64, 96, 128, 256, None))
        name = f"{name}-{'channel' if group is None else f'g{group}'}{asym}"
        columns = columns if group is None else group * generator.randrange(1, 8)
    out = generator.choice((1, 2, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 129))
    rows = generator.choice((1, 2, 3, 7, 8, 9, 16, 17, 33, 47, 64, 65))
    kind = native.NativeInt8 if quantizes_inputs else generator.choice(KINDS)
    kind = native.NativeExact if base.startswith("fp8") else kind
    return Call(
        number, seed, name, (out, columns), rows, generator.choice(DTYPES), generator.random() < 0.3, kind.name,
        generator.choice((1, 1, 2, 3, 5)), generator.choice(runnable), generator.random() < 0.3,
        generator.choice(("normal", "normal", "zero", "huge", "tiny", "nan", "inf")), generator.random() < 0.7,
    )  # fmt: skip


def inputs(call: Call, generator: torch.Generator) -> Tensor:
    x = torch.randn(call.rows, call.shape[1], generator=generator)
    scale = {"zero": 0.0, "huge": torch.finfo(call.dtype).max / 8, "tiny": torch.finfo(call.dtype).tiny}
    x = (x * scale.get(call.values, 1.0)).to(call.dtype)
    if call.values in ("nan", "inf"):
        x[call.rows // 2, call.shape[1] // 2] = float(call.values)
    return x


@contextlib.contextmanager
def packs_between_guards(guarded: Guarded, at_end: bool) -> Iterator[None]:
    class Pool:
        def take(self, library: Library, size: int) -> Tensor:
            return guarded.empty((size,), torch.uint8, at_end, 64).zero_()

    original = native._pool
    native._pool = Pool()
    try:
        yield
    finally:
        native._pool = original


def perform(call: Call, loaded: Library) -> None:
    """Pack, multiply and dequantize between guard pages.

    Raises:
        AssertionError: a result that is wrong, or something was written beside a buffer.
    """
    generator, guarded = torch.Generator().manual_seed(call.number), Guarded()
    scheme = Scheme.parse(call.scheme)
    qtensor = QTensor.of(scheme, call.shape, scheme.random(call.shape, generator))
    kernel = named(call.kernel)(call.instructions)
    if kernel.unsupported(qtensor, call.dtype, torch.device("cpu")):
        return
    codes = guarded.copy(qtensor.codes, call.at_end, 4)
    if call.transposed and codes.dim() == 2:
        codes = guarded.copy(qtensor.codes.t().contiguous(), call.at_end, 4).t()
    torch.set_num_threads(call.threads)
    with packs_between_guards(guarded, call.at_end):
        packed = native._pack(loaded, replace(qtensor, codes=codes))
    torch.set_num_threads(1)
    before = packed.clone()
    x = guarded.copy(inputs(call, generator), call.at_end, call.dtype.itemsize)
    y = guarded.empty((call.rows, call.shape[0]), call.dtype, call.at_end, call.dtype.itemsize)
    bias = guarded.copy(torch.randn(call.shape[0], generator=generator), call.at_end, 4) if call.bias else None
    chosen, dtype = loaded.instructions.index(call.instructions), native.DTYPES[call.dtype]
    assert not loaded.lib.bitpress_linear(
        packed.data_ptr(), x.data_ptr(), call.rows, dtype, None if bias is None else bias.data_ptr(), y.data_ptr(),
        kernel.inputs, chosen, call.threads,
    )  # fmt: skip
    first = 16 * (call.number % -(-call.shape[0] // 16))  # whole blocks of 16, or up to the end
    count = min(16 * (1 + call.number % 3), call.shape[0] - first)
    weight = guarded.empty((count, call.shape[1]), torch.float32, call.at_end, 4)
    assert not loaded.lib.bitpress_dequantize(
        packed.data_ptr(), first, count, native.DTYPES[torch.float32], weight.data_ptr(), chosen, call.threads
    )
    guarded.check()
    assert torch.equal(packed, before), "the weight was written to"
    expected = qtensor.dequantize()
    assert torch.allclose(weight, expected[first : first + count], rtol=2.0**-10, atol=1e-6), "dequantized wrongly"
    _compare(call, qtensor, x, y, bias, expected.double())


def _compare(call: Call, qtensor: QTensor, x: Tensor, y: Tensor, bias: Tensor | None, weight: Tensor) -> None:
    """Rows with NaN or Inf spoil no other; the others are near the product in float64. A static range has an end, which
    Inf is rounded to as all that is beyond."""
    static = qtensor.scheme.static
    good = ~x.isnan().any(1) if static else x.isfinite().all(1)
    assert good.all() or not y[~good].isfinite().all(), "NaN or Inf came out finite"
    x, y = x[good].double(), y[good].double()
    if not len(x):
        return
    if (activations := qtensor.scheme.activations) is not None:
        x = activations.apply(x.float(), qtensor.extra).double()
    elif (bits := named(call.kernel).input_bits) is not None:
        # Inputs share a scale with a group of weights, of at most 128.
        step = native._grouping(Scheme.parse(call.scheme), call.shape[1])[0]
        padded = torch.nn.functional.pad(x, (0, -x.shape[1] % step)).unflatten(-1, (-1, step)).float()
        counts = (x.shape[1] - step * torch.arange(padded.shape[-2])).clamp(max=step)
        codes, scales = quantize_rows(padded) if bits == (8, 8) else wide_codes(padded, counts, bits == (8, 16))
        x = (codes.double() * scales.double()).flatten(-2)[:, : x.shape[1]]
    product = x @ weight.t() + (0 if bias is None else bias.double())
    terms = (x.square() @ weight.square().t()).sum() + (0 if bias is None else bias.double().square().sum() * len(x))
    finite = y.isfinite()
    assert finite.all() or call.values == "huge", "NaN or Inf came out of numbers of an ordinary size"
    error = (y - product)[finite].norm()
    bound = max(BOUND[call.dtype], CODEBOOK if call.scheme.startswith("nf4") else 0)
    assert error <= bound * terms.sqrt() + torch.finfo(call.dtype).tiny * y.numel(), f"error {error / terms.sqrt()}"


def named(kernel: str) -> type[native.NativeInt8]:
    return next(kind for kind in KINDS if kind.name == kernel)


@dataclass(frozen=True)
class LayerCall:
    """One step of a random decoder layer. first: each sequence's first place that counts."""

    number: int
    seed: int
    scheme: str
    first: tuple[int, ...]
    count: int
    heads: int
    key_heads: int
    dim: int
    hidden: int
    inner: int
    length: int
    room: int
    extras: bool
    activation: str
    dtype: torch.dtype
    kernel: str
    threads: int
    instructions: str
    values: str
    at_end: bool
    fused: bool
    gated: bool
    sandwich: bool
    centered: bool
    cap: float | None
    experts: int
    shared: bool
    window: int | None
    rotated: int
    cache: str | None


def make_layer_call(number: int, seed: int, runnable: list[str]) -> LayerCall:
    generator = random.Random(f"layer {seed} {number}")
    step = {"int4-g64-asym": 64, "int8-g128": 128, "nf4": 64}.get(scheme := generator.choice(LAYER_SCHEMES), 32)
    kind = native.NativeExact if scheme == "fp8" else generator.choice(KINDS)
    kind = native.NativeInt8 if Scheme.parse(scheme).activations else kind
    dim, key_heads = generator.choice((16, 32, 48, 64, 112, 128)), generator.choice((1, 2, 3))
    heads = key_heads * generator.choice((1, 2, 3, 5))
    while heads * dim % step:  # what o reads consists of whole groups
        heads += key_heads
    length = generator.choice((0, 1, 2, 15, 16, 17, 63, 64, 100, 255, 256, 700))
    count = generator.choice((1, 1, 1, 2, 9, 65))
    batch = generator.choice((1, 1, 2, 3))
    first = tuple(generator.choice((0, 0, generator.randrange(length + count))) for _ in range(batch))
    return LayerCall(
        number, seed, scheme, first, count, heads, key_heads, dim, step * generator.randrange(1, 4),
        step * generator.randrange(1, 6), length, generator.choice((1, 2, 7)), generator.random() < 0.5,
        generator.choice(ACTIVATIONS), generator.choice(DTYPES),
        kind.name, generator.choice((1, 1, 2, 3)), generator.choice(runnable),
        generator.choice(("normal", "normal", "zero", "huge", "nan")), generator.random() < 0.7,
        *(generator.random() < 0.4 for _ in range(4)), generator.choice((None, None, 2.5)),
        generator.choice((0, 0, 1, 2, 5, 17)), generator.random() < 0.5,
        generator.choice((None, None, 1, 2, 30, 64, 90)), generator.choice((0, 2, 8, dim, dim)),
        generator.choice((None, *(name for name in CACHES if not parse_cache(name).problems(dim)))),
    )  # fmt: skip


def perform_layer(call: LayerCall, loaded: Library) -> None:
    """One step between guard pages; padding's keys and values are NaN, and the room for further ones before and after.

    Raises:
        AssertionError: a result that is wrong, or something was written beside a buffer.
    """
    generator, guarded = torch.Generator().manual_seed(call.number), Guarded()
    kernel = named(call.kernel)(call.instructions)

    weights: list[Tensor] = []

    def copied(tensor: Tensor) -> Tensor:
        return guarded.copy(tensor, call.at_end, tensor.itemsize)

    def linear(out_features: int, in_features: int) -> QLinear:
        scheme = Scheme.parse(call.scheme)
        shape = (out_features, in_features)
        qtensor = QTensor.of(scheme, shape, scheme.random(shape, generator))
        if call.scheme == "mxfp4":
            qtensor.scales.sub_(in_features.bit_length() // 2)
        elif call.scheme == "nvfp4":
            qtensor.extra["global_scale"].mul_(in_features**0.5)
        else:
            qtensor.scales.div_(in_features**0.5)
        weights.append(qtensor.dequantize().double())
        if call.extras and scheme.weight.holds_order:
            qtensor = replace(qtensor, order=torch.randperm(in_features, generator=generator).to(torch.int32))
        bias = copied(torch.randn(out_features, generator=generator)) if call.extras else None
        layer = QLinear(qtensor, bias, torch.float32, "auto" if scheme.activations else "native-bf16")
        layer.selection = Selection(kernel, {})
        layer.packed.instructions = kernel.chosen()
        return layer

    def norm(features: int) -> Norm:
        weight, bias = (torch.randn(features, generator=generator) for _ in range(2))
        return Norm(copied(weight), 1e-3, copied(bias) if call.centered else None, call.centered)

    def mlp() -> tuple[QLinear, QLinear | None, QLinear]:
        both = call.fused and call.gated
        gate = linear(call.inner * (2 if both else 1), call.hidden)
        return (
            gate,
            linear(call.inner, call.hidden) if call.gated and not both else None,
            linear(call.hidden, call.inner),
        )

    queries, keys = call.heads * call.dim, call.key_heads * call.dim
    shapes = [(queries + 2 * keys, call.hidden)] if call.fused else [(queries, call.hidden), *[(keys, call.hidden)] * 2]
    of_heads = (norm(call.dim), norm(call.dim)) if call.extras else (None, None)
    routed: Experts | None = None
    with packs_between_guards(guarded, call.at_end):
        attention = [*(linear(*shape) for shape in shapes), *[None] * (3 - len(shapes)), linear(call.hidden, queries)]
        own = mlp() if call.shared or not call.experts else (None, None, None)
        if call.experts:
            router = copied(torch.randn(call.experts, call.hidden, generator=generator))
            gate = copied(torch.randn(call.hidden, generator=generator)) if call.centered else None
            experts = tuple(mlp() for _ in range(call.experts))
            routed = Experts(router, min(2, call.experts), call.gated, experts, gate)
    after = norm(call.hidden) if call.sandwich else None
    norms = (norm(call.hidden), after, norm(call.hidden), after, *of_heads)
    parts = Parts(
        (*attention, *own), norms, call.heads, call.key_heads, call.dim, 0.3, call.activation, call.cap, routed
    )
    assert parts.unsupported() is None, parts.unsupported()
    batch = len(call.first)
    x = torch.randn(batch, call.count, call.hidden, generator=generator)
    x *= {"zero": 0.0, "huge": torch.finfo(torch.float16).max / 8}.get(call.values, 1.0)
    if call.values == "nan":
        x[0, 0, call.number % call.hidden] = torch.nan
    x = copied(x.to(call.dtype))
    angles = 6 * torch.rand(batch if call.number % 4 > 1 else 1, call.count, call.rotated, generator=generator)
    cos, sin = copied(angles.cos().to(call.dtype)), copied(angles.sin().to(call.dtype))
    cache = torch.full((2, batch, call.key_heads, call.length + call.count + call.room - 1, call.dim), torch.nan)
    for sequence, start in enumerate(call.first):
        filled = cache[:, sequence, :, start : call.length]
        filled.copy_(torch.randn(filled.shape, generator=generator))
    kind = None if call.cache is None else parse_cache(call.cache)
    scale = None if kind is None or kind.dynamic else kind.scale(torch.linspace(2, 9, call.key_heads))
    filled = [each.to(call.dtype) for each in cache]
    if kind is not None:
        filled = [rounded(kind, each, scale) for each in filled]
    expected = _layer(call, parts, weights, x, (cos, sin), *(each.clone() for each in filled), scale)
    begin = 0 if call.window is None else max(0, call.length + 1 - call.window)
    caches: list[dict[str, Tensor]] = []
    for each in filled:
        each = each[:, :, begin:]
        unread = each if kind is None or kind.dynamic else each.nan_to_num(1e4)
        codes = {"codes": unread} if kind is None else dict(kind.encode(unread, scale))
        if scale is not None:
            codes["scales"] = scale.flatten().expand(batch, call.key_heads)
        caches.append({name: copied(each) for name, each in codes.items()})
    before = [{name: each.clone() for name, each in codes.items()} for codes in caches]
    first = copied(torch.tensor(call.first)) if any(call.first) else None
    original = torch.empty_like
    torch.empty_like = lambda like: guarded.empty(tuple(like.shape), like.dtype, call.at_end, like.itemsize)
    torch.set_num_threads(call.threads)
    try:
        layers = NativeLayers([NativeLayer(parts)])
        rotation = (cos, sin) if call.rotated else None
        how = None if kind is None else coding(kind, call.dim)
        assert not isinstance(how, str), how
        context = Context(caches[0], caches[1], rotation, begin, call.window, how)
        y = layers.step(x, [context], call.length, first)
        if batch == call.count == 1 and first is None:
            after_layers(layers, context, x, y, call, guarded)
    finally:
        torch.empty_like = original
        torch.set_num_threads(1)
    guarded.check()
    end = call.length + call.count - begin
    for codes, was in zip(caches, before):
        for name, each in codes.items():
            if each.dim() == 4:
                now, then = (tensor[:, :, end:].contiguous().view(torch.uint8) for tensor in (each, was[name]))
                assert torch.equal(now, then), "written into the room of other tokens"
    if call.values == "nan":
        assert not y[0, 0].isfinite().any(), "NaN came out finite"
        assert y[1:].isfinite().all(), "NaN came out of another sequence"
    elif (kernel.input_bits is None or kernel.input_bits[0] > 8) and not (
        call.experts > 2 and call.values != "normal"
    ):  # a code of 8 bits may jump at a
        # difference in the last bit, and so may the choice between experts that are liked about as much
        places = call.length + torch.arange(call.count)
        real = places >= torch.tensor(call.first).unsqueeze(1)
        error = (y.double() - expected)[real].norm()
        bound = BOUND[call.dtype] if kernel.input_bits is None or call.scheme != "nf4" else CODEBOOK
        bound += 0 if kind is None else JUMPS
        assert error <= bound * expected[real].norm(), f"error {error} of {expected[real].norm()}"


def after_layers(
    layers: NativeLayers, context: Context, x: Tensor, y: Tensor, call: LayerCall, guarded: Guarded
) -> None:
    """The same step of one token from its row of an embedding to the largest logit, by a dense head.

    Raises:
        AssertionError: a token or logits that are others than those of what the layers gave, `y` [1, 1, hidden].
    """
    generator, vocabulary = torch.Generator().manual_seed(call.number), 1 + call.number % 1100
    rows = torch.randn(2, vocabulary, call.hidden, generator=generator).to(call.dtype)
    rows[0, -1] = x.flatten()
    embedding, head = (guarded.copy(each, call.at_end, each.itemsize) for each in rows)
    if native.dense_unsupported(head) is not None:
        return
    decoder = NativeDecoder(layers, embedding, head, call.dtype)
    decoder.begin([context])
    best = decoder.next(vocabulary - 1, call.length, [context.rotation], None)
    logits, expected = decoder.logits[0].double(), head.double() @ y.flatten().double()
    order = logits.nan_to_num(torch.inf)  # NaN is the largest
    assert best == int((order == order.max()).nonzero()[0]), f"token {best} is not the likeliest of {vocabulary}"
    assert torch.equal(decoder.largest[0, 0].double().nan_to_num(torch.inf), order[best]), "another logit"
    if y.isfinite().all() and logits.isfinite().all():
        assert (logits - expected).norm() <= BOUND[call.dtype] * expected.norm(), "other logits"


def _layer(
    call: LayerCall,
    parts: Parts,
    weights: list[Tensor],
    x: Tensor,
    rotation: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    scale: Tensor | None,
) -> Tensor:
    """In float64 the output [batch, count, hidden] of linear layers with these weights; fills keys and values."""
    dtype, (cos, sin) = x.dtype, (table.double().unsqueeze(1) for table in rotation)
    batch, end = len(x), call.length + call.count
    weight_of = dict(zip(map(id, parts.all_linears()), weights))

    def linear(layer: QLinear | None, x: Tensor) -> Tensor:
        assert layer is not None
        x = x if layer.order is None else x.index_select(-1, layer.order)
        return x @ weight_of[id(layer)].t() + (0 if layer.bias is None else layer.bias.double())

    def normed(x: Tensor, norm: Norm | None) -> Tensor:
        if norm is None:
            return x
        x = x - x.mean(-1, keepdim=True) if norm.centered else x
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight
        return x if norm.bias is None else x + norm.bias

    def rotated(x: Tensor) -> Tensor:
        low, high = x[..., : call.rotated].chunk(2, -1)
        turned = torch.cat([-high, low], -1) * sin
        return torch.cat([x[..., : call.rotated] * cos + turned, x[..., call.rotated :]], -1)

    def heads(x: Tensor) -> Tensor:
        return x.view(batch, call.count, -1, parts.dim).transpose(1, 2)

    def activated(x: Tensor) -> Tensor:
        if parts.activation.startswith("gelu"):
            return F.gelu(x, approximate="tanh" if parts.activation == "gelu_tanh" else "none")
        return F.relu(x) if parts.activation == "relu" else F.silu(x)

    def through(mlp: tuple[QLinear | None, ...], h: Tensor) -> Tensor:
        if not call.gated:
            return linear(mlp[2], activated(linear(mlp[0], h)))
        gate, up = linear(mlp[0], h).chunk(2, -1) if call.fused else (linear(mlp[0], h), linear(mlp[1], h))
        return linear(mlp[2], activated(gate) * up)

    x = x.double()
    h = normed(x, parts.norms[0])
    sizes = [call.heads * call.dim, *[call.key_heads * call.dim] * 2]
    projected = torch.cat([linear(each, h) for each in parts.linears[:3] if each is not None], -1).split(sizes, -1)
    q, k, v = map(heads, projected)
    for states, new in ((keys, rotated(normed(k, parts.norms[5]))), (values, v)):
        kept = new if call.cache is None else rounded(parse_cache(call.cache), new.float(), scale)
        states[:, :, call.length : end] = kept.to(dtype)
    query, mixed = rotated(normed(q, parts.norms[4])), torch.zeros_like(q)
    group = call.heads // call.key_heads
    for sequence, start in enumerate(call.first):
        for token in range(max(0, start - call.length), call.count):
            own = call.length + token
            seen = slice(max(start, own + 1 - (call.window or own + 1)), own + 1)
            each = keys[sequence, :, seen].double().repeat_interleave(group, 0)
            scores = parts.scale * (each @ query[sequence, :, token].unsqueeze(-1)).squeeze(-1)
            if parts.cap is not None:
                scores = parts.cap * torch.tanh(scores / parts.cap)
            shares = scores.softmax(-1).unsqueeze(1)
            each = values[sequence, :, seen].double().repeat_interleave(group, 0)
            mixed[sequence, :, token] = (shares @ each).squeeze(1)
    x = x + normed(linear(parts.linears[3], mixed.transpose(1, 2).reshape(batch, call.count, -1)), parts.norms[1])
    h, y = normed(x, parts.norms[2]), torch.zeros_like(x)
    if parts.linears[4] is not None:
        y = through(parts.linears[4:], h)
    if (routed := parts.experts) is not None:
        if routed.shared_gate is not None:
            y = y * (h @ routed.shared_gate.double()).sigmoid().unsqueeze(-1)
        liked = (h @ routed.router.double().t()).softmax(-1)
        top, chosen = liked.topk(routed.active, -1)
        kept = torch.zeros_like(liked).scatter(-1, chosen, top / top.sum(-1, True) if routed.renormalized else top)
        for number, mlp in enumerate(routed.linears):
            y = y + kept[..., number : number + 1] * through(mlp, h)
    return x + normed(y, parts.norms[3])


@dataclass(frozen=True)
class ColumnsCall:
    """One loop over the columns of a block. gap: numbers between one row of the factor and the next."""

    number: int
    seed: int
    columns: int
    rows: int
    gap: int
    groups: int
    settle: bool
    instructions: str
    values: str
    at_end: bool


def make_columns_call(number: int, seed: int, runnable: list[str]) -> ColumnsCall:
    generator = random.Random(f"columns {seed} {number}")
    columns, rows = (1, 2, 7, 16, 33, 64, 127, 128), (1, 2, 15, 63, 64, 65, 129, 300)
    return ColumnsCall(
        number, seed, generator.choice(columns), generator.choice(rows), generator.choice((0, 0, 1, 5)),
        generator.choice((1, 2, 5)), generator.random() < 0.5, generator.choice(runnable),
        generator.choice(("normal", "normal", "zero", "huge", "nan")), generator.random() < 0.7,
    )  # fmt: skip


def perform_columns(call: ColumnsCall, loaded: Library) -> None:
    """The loop between guard pages; what it does not need to read, below the factor's diagonal and beside it, is NaN.

    Raises:
        AssertionError: a result that is wrong, or something was written beside a buffer.
    """
    generator, guarded = torch.Generator().manual_seed(call.number), Guarded()
    shape, count = (call.columns, call.rows), call.columns

    def copied(tensor: Tensor) -> Tensor:
        return guarded.copy(tensor, call.at_end, 4)

    factor = torch.full((count, count + call.gap), torch.nan)
    factor[:, :count] = torch.randn(count, count, generator=generator) / count**0.5
    factor[:, :count].diagonal().abs_().add_(0.5)
    factor[:, :count].masked_fill_(torch.ones(count, count).tril(-1).bool(), torch.nan)
    factor = copied(factor.flatten()[: count * (count + call.gap) - call.gap])  # the last row's gap is not there
    upper = factor.as_strided((count, count), (count + call.gap, 1))
    grid = tuple(
        copied(table)
        for table in (
            torch.rand(call.groups, call.rows, generator=generator) + 0.2,
            -torch.randint(0, 16, (call.groups, call.rows), generator=generator).float(),
            torch.randint(0, 16, (call.groups, call.rows), generator=generator).float(),
        )
    )
    groups = copied(torch.randint(0, call.groups, (count,), generator=generator, dtype=torch.int32))
    start = torch.randn(shape, generator=generator) * {"zero": 0.0, "huge": 2.0**120}.get(call.values, 4.0)
    if call.values == "nan":
        start[count // 2, call.rows // 2] = torch.nan
    before = torch.randint(-3, 4, shape, generator=generator).float() if call.settle else torch.full(shape, torch.nan)
    left, codes, steps = copied(start), copied(before), guarded.empty(shape, torch.float32, call.at_end, 4)
    kept = [each.clone() for each in (factor, *grid, groups)]
    alone = replace(loaded, available=tuple(each == call.instructions for each in loaded.instructions))
    original = gptq_columns.library
    gptq_columns.library = lambda: alone
    try:
        loop = gptq_columns.settle_columns if call.settle else gptq_columns.round_columns
        loop(left, upper, grid, groups, codes, steps)
    finally:
        gptq_columns.library = original
    guarded.check()
    for each, was in zip((factor, *grid, groups), kept):
        assert torch.equal(each.nan_to_num(7), was.nan_to_num(7)), "an input was written to"
    good = ~start.isnan().any(0)
    assert codes.isfinite().all(), "a code is no number"
    scale, low, high = (table[groups.long()] for table in grid)
    ideal = before + left * (1 / upper.diagonal().unsqueeze(1)) / scale if call.settle else left / scale
    rounded_codes = ideal.maximum(low).minimum(high).round()
    assert torch.equal(codes[:, good], rounded_codes[:, good]), "other codes than those nearest"
    if call.values == "huge":
        return
    wide, strict = steps[:, good].double(), upper.double().triu(1).nan_to_num()
    expected = start[:, good].double() - strict.t() @ wide
    most = start[:, good].double().abs() + strict.abs().t() @ wide.abs()
    assert ((left[:, good] - expected).abs() <= 2.0**-23 * count * most).all(), "other compensations"
    exact = (codes - before) * scale if call.settle else (left - codes * scale) / upper.diagonal().unsqueeze(1)
    assert torch.allclose(steps[:, good], exact[:, good], rtol=2.0**-20, atol=2.0**-20), "other steps"


def make(number: int, seed: int, runnable: list[str]) -> Call | LayerCall | ColumnsCall:
    turn = number % TURNS
    if turn == TURNS - 1:
        return make_layer_call(number, seed, runnable)
    return (make_columns_call if turn == TURNS - 2 else make_call)(number, seed, runnable)


def run_batch(first: int, count: int, seed: int, loaded: Library) -> list[str]:
    """Sentences on what went wrong in calls first .. first + count, made in processes of their own."""
    findings = []
    counter = mmap.mmap(-1, 8)
    while count > 0:
        counter[:8] = first.to_bytes(8, "little")
        child = os.fork()
        if not child:
            code = 0
            try:
                for number in range(first, first + count):
                    counter[:8] = number.to_bytes(8, "little")
                    call = make(number, seed, loaded.runnable)
                    if isinstance(call, LayerCall):
                        perform_layer(call, loaded)
                    elif isinstance(call, ColumnsCall):
                        perform_columns(call, loaded)
                    else:
                        perform(call, loaded)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                code = 9
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if not code:
            break
        number = int.from_bytes(counter[:8], "little")
        how = signal.Signals(-code).name if code < 0 else "see above"
        findings.append(
            f"{how}: {make(number, seed, loaded.runnable)}\n"
            f"    python tests/fuzz/native_kernels.py --seed {seed} --first {number} --count 1"
        )
        count -= number + 1 - first
        first = number + 1
    return findings


def run_sanitized() -> int:
    """Build the library with both sanitizers and start this program again under them; its exit code."""
    gcc = shutil.which("gcc")
    assert gcc, "--sanitized needs gcc"
    csrc = Path(native_library.__file__).parent / "csrc"
    emulated = Path(__file__).parents[1] / "kernels" / "cpu" / "emulated_amx.c"
    sources = [emulated if path.name == "amx.c" else path for path in sorted(csrc.glob("*.c"))]
    flags = [flag for flag in native_library._FLAGS if not flag.startswith("-O")]
    sanitizers = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "sanitized.so"
        command = [gcc, *flags, *sanitizers, f"-I{csrc}", "-shared", "-o", target, *sources, "-lm", "-lpthread"]
        subprocess.run(command, check=True)
        runtimes = [
            subprocess.run([gcc, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
            for name in ("libasan.so", "libubsan.so")
        ]
        environment = os.environ | {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"}
        arguments = [argument for argument in sys.argv[1:] if argument != "--sanitized"]
        command = [sys.executable, __file__, *arguments, "--library", str(target)]
        return subprocess.run(command, env=environment, check=False).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10**9, help="calls at most")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first call")
    parser.add_argument("--sanitized", action="store_true")
    parser.add_argument("--library", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sanitized:
        sys.exit(run_sanitized())
    if options.library:  # for decoder layers, too, which ask for the library themselves
        native_library._HERE, native_library._build = Path(os.devnull), lambda: options.library
    loaded = library()
    if isinstance(loaded, str):
        sys.exit(f"there is nothing to call: {loaded}")
    start, number, end = time.monotonic(), options.first, options.first + options.count
    findings = []
    while number < end and time.monotonic() - start < 60 * options.minutes:
        count = min(BATCH, end - number)
        for finding in run_batch(number, count, options.seed, loaded):
            findings.append(finding)
            print(finding, flush=True)
        number += count
    seconds, what = time.monotonic() - start, ", ".join(loaded.runnable)
    print(f"seed {options.seed}, calls {options.first} to {number - 1} ({what}) in {seconds:.0f} s: ", end="")
    print(f"{len(findings)} findings")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
