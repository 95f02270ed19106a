"""What decoder layers do for the next tokens of some sequences, in one call of csrc/layer.c.

Python and transformers take about as long for the hundred small operations of a layer as its quantized weights take to
be read. Here they are one, for a layer or for all of them: from the input to the output everything is float32, where a
model rounds to its own dtype after every operation; keys and values are kept in the model's dtype.

A layer is a description of its parts: which linear layers are fused, where norms sit and of which kind, what attention
reads, whether an MLP has a gate or a layer has experts. Llama, Gemma, Phi-3, GPT-2 and Mixtral are such descriptions.
"""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .caches.base import CacheType, Codes
from .cpu.library import Library, library
from .cpu.native import DTYPES, NativeWeight, inputs_of, rounds_inputs
from .kv_cache import static
from .linear import QLinear
from .registry import Selection

ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu")

# What codes of a rounded cache are in csrc/layer.h, by their type, their bits, and whether features have groups.
_CACHED = {("int", 8, False): 1, ("int", 8, True): 1, ("int", 4, True): 2, ("float", 8, False): 3}
_CODE_DTYPES = (None, torch.int8, torch.uint8, torch.float8_e4m3fn)

_POINTER, _INT64, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_LANES = 16  # of the widest registers
_QUERY, _KEY, _VALUE, _OUTPUT, _GATE, _UP, _DOWN = range(7)
_Shape = tuple[int, int]


@dataclass(frozen=True)
class Norm:
    """x / sqrt(mean(x^2) + eps) * weight + bias, of x less its mean where it is `centered`.

    weight, bias: float32 [features]. A norm of fewer features than its input has takes one head after the other.
    """

    weight: Tensor
    eps: float
    bias: Tensor | None = None
    centered: bool = False


@dataclass(frozen=True)
class Experts:
    """Each token goes to the `active` experts that its softmax of `router` likes best, its probabilities the shares.

    Attributes:
        router: float32 [experts, hidden].
        renormalized: a token's shares are divided by their sum.
        linears: gate, up and down of each expert; as Parts has them.
        shared_gate: float32 [hidden], whose sigmoid is the share of the layer's own MLP, which serves each token
            besides, where it has one; None: its share is 1.
    """

    router: Tensor
    active: int
    renormalized: bool
    linears: tuple[tuple[QLinear, QLinear | None, QLinear], ...]
    shared_gate: Tensor | None = None


@dataclass(frozen=True)
class Parts:
    """A decoder layer: x += norm(o(attention(q, k, v of norm(x)))), x += norm(down(activation(gate) * up of norm(x))).

    Attributes:
        linears: q, k, v, o, gate, up, down, with or without bias. Without k and v, q has the outputs of all three, one
            after the other. Without up, gate has the outputs of both, or there is no up to multiply by. Without gate
            and down, the experts are the MLP.
        norms: before attention, after it, before the MLP, after it, of queries and of keys; None: there is none.
        heads, key_heads, dim: heads of q that follow each other share a head of k and v. Features of a head, as many as
            the rotation has, are rotated in halves.
        scale: queries are multiplied by it. cap: scores become cap * tanh(score / cap); None: they stay.
    """

    linears: tuple[QLinear | None, ...]
    norms: tuple[Norm | None, ...]
    heads: int
    key_heads: int
    dim: int
    scale: float
    activation: str
    cap: float | None = None
    experts: Experts | None = None

    @property
    def hidden(self) -> int:
        """The features of the layer's input."""
        query = self.linears[_QUERY]
        assert query is not None
        return query.in_features

    def all_linears(self) -> list[QLinear]:
        """The layer's and its experts', those that there are."""
        rows = [self.linears, *(self.experts.linears if self.experts else ())]
        return [layer for row in rows for layer in row if layer is not None]

    def unsupported(self) -> str | None:
        """Why NativeLayer cannot run it, in a few words; None if it can."""
        for layer in self.all_linears():
            if not isinstance(layer.packed, NativeWeight):
                return f"a linear layer runs on {layer.selection.kernel.name}"
            if rounds_inputs(layer.scheme):
                return f"the inputs of {layer.scheme.name} are rounded by rows, or to FP8"
        if self.dim % _LANES:
            return f"heads of {self.dim} features; expected a multiple of {_LANES}"
        if self.heads % self.key_heads:
            return f"{self.key_heads} heads of keys to {self.heads} of queries"
        queries, keys, hidden = self.heads * self.dim, self.key_heads * self.dim, self.hidden
        attention = [_shape(layer) for layer in self.linears[:_GATE]]
        apart: list[_Shape | None] = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
        if attention not in (apart, [(queries + 2 * keys, hidden), None, None, (hidden, queries)]):
            return "linear layers of attention that do not fit each other"
        mlps = [self.linears[_GATE:], *(self.experts.linears if self.experts else ())]
        if any(not _fits(mlp, hidden) for mlp in mlps if not (self.experts and mlp == (None, None, None))):
            return "linear layers of an MLP that do not fit each other"
        widths = [[hidden]] * 4 + [[self.dim, queries], [self.dim, keys]]
        if any(norm and norm.weight.numel() not in width for norm, width in zip(self.norms, widths)):
            return "norms that do not fit the linear layers"
        if self.activation not in ACTIVATIONS:
            return f"activation {self.activation}; expected one of {', '.join(ACTIVATIONS)}"
        if self.experts and (hidden % _LANES or self.experts.router.shape != (len(self.experts.linears), hidden)):
            return f"a router {list(self.experts.router.shape)} of {len(self.experts.linears)} experts"
        return None


def _shape(layer: QLinear | None) -> _Shape | None:
    return None if layer is None else (layer.out_features, layer.in_features)


def _fits(mlp: Sequence[QLinear | None], hidden: int) -> bool:
    """Whether gate, up and down multiply by each other's outputs; see Parts."""
    gate, up, down = map(_shape, mlp)
    if gate is None or down is None:
        return False
    inner = down[1]
    gates: list[tuple[_Shape, _Shape | None]] = [
        ((inner, hidden), None),
        ((2 * inner, hidden), None),
        ((inner, hidden), (inner, hidden)),
    ]
    return down[0] == hidden and (gate, up) in gates


@dataclass(frozen=True)
class Coding:
    """How a cache holds what is rounded on its way into it: as codes, which attention reads as they lie.

    Attributes:
        number: which codes these are in csrc/layer.h.
        group: the features of a token and head that share a scale, float16; 0: all tokens of a head share one.
    """

    number: int
    group: int


def coding(cache: CacheType, dim: int) -> Coding | str:
    """How a cache of this type holds heads of `dim` features, or why csrc/layer.h does not read it."""
    if problems := cache.problems(dim):
        return problems[0]
    says = cache.description()
    group = says.get("group_size", 0) if says.get("strategy") == "group" else 0
    number = _CACHED.get((str(says.get("type")), int(says.get("num_bits", 0)), bool(group)))
    calibrated = static(cache)
    scale = calibrated.scale(torch.ones(1)) if calibrated else None
    codes = cache.encode(torch.zeros(1, 1, 1, dim), scale)
    lies = {name: (codes[name].dtype, codes[name].numel()) for name in codes}
    scales = {"scales": (torch.float16, dim // group)} if group else {}
    bytes_ = dim // 2 if says.get("num_bits") == 4 else dim
    if number is None or bool(group) != cache.dynamic or lies != {"codes": (_CODE_DTYPES[number], bytes_), **scales}:
        return f"keys and values in a cache of {cache.name} are not read as they lie"
    return Coding(number, group)


@dataclass(frozen=True)
class Context:
    """What is a layer's own in a step, besides its input.

    Attributes:
        keys, values: contiguous [batch, key_heads, capacity, …]; filled from place 0 on, with room for those of the
            step. "codes": without a coding the numbers themselves, [..., dim], in the input's dtype; otherwise as the
            cache's type has them, and "scales", float16 [..., dim / group], or float32 [batch, key_heads] without
            groups: these become NaN where a number was.
        rotation: cos and sin [batch or 1, count, rotated features], contiguous, likewise; None: nothing is rotated.
        start: the number, in its sequence, of the token at place 0.
        window: a token sees so many, itself the last; None: all before it.
    """

    keys: Codes
    values: Codes
    rotation: tuple[Tensor, Tensor] | None
    start: int = 0
    window: int | None = None
    coding: Coding | None = None


class _Linear(ctypes.Structure):
    _fields_ = (
        ("packed", _POINTER), ("bias", _POINTER), ("order", _POINTER), ("in_features", _INT64),
        ("out_features", _INT64), ("inputs", _INT64),
    )  # fmt: skip


class _Norm(ctypes.Structure):
    _fields_ = (
        ("weight", _POINTER), ("bias", _POINTER), ("features", _INT64), ("centered", _INT64), ("eps", _FLOAT)
    )  # fmt: skip


class _Experts(ctypes.Structure):
    _fields_ = (
        ("linears", _POINTER), ("router", _POINTER), ("shared_gate", _POINTER), ("count", _INT64), ("active", _INT64),
        ("renormalized", _INT64),
    )  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = (
        ("linears", _Linear * 7), ("norms", _Norm * 6), ("experts", _POINTER), ("heads", _INT64),
        ("key_heads", _INT64), ("dim", _INT64), ("activation", _INT64), ("kernel", _INT64), ("scale", _FLOAT),
        ("cap", _FLOAT),
    )  # fmt: skip


class _Context(ctypes.Structure):
    _fields_ = (
        ("keys", _POINTER), ("values", _POINTER), ("key_scales", _POINTER), ("value_scales", _POINTER),
        ("cos", _POINTER), ("sin", _POINTER), ("capacity", _INT64), ("start", _INT64), ("window", _INT64),
        ("rotated", _INT64), ("apart", _INT64), ("cached", _INT64), ("group", _INT64),
    )  # fmt: skip


class _Step(ctypes.Structure):
    _fields_ = (
        ("x", _POINTER), ("y", _POINTER), ("contexts", _POINTER), ("first", _POINTER), ("norm", _Norm),
        ("batch", _INT64), ("count", _INT64), ("length", _INT64), ("dtype", _INT64), ("threads", ctypes.c_int),
    )  # fmt: skip


class _Around(ctypes.Structure):
    _fields_ = (
        ("embedding", _POINTER), ("dense", _POINTER), ("tokens", _POINTER), ("head", _Linear), ("logits", _POINTER),
        ("best", _POINTER), ("largest", _POINTER), ("vocabulary", _INT64),
    )  # fmt: skip


@functools.cache
def _functions() -> tuple["ctypes._NamedFuncPointer", "ctypes._NamedFuncPointer"]:
    """bitpress_layers_step and bitpress_next_tokens."""
    native = library()
    assert isinstance(native, Library)
    step, next_tokens = native.lib.bitpress_layers_step, native.lib.bitpress_next_tokens
    step.argtypes, next_tokens.argtypes = [_POINTER, _INT64, _POINTER], [_POINTER, _INT64, _POINTER, _POINTER]
    return step, next_tokens


class NativeLayer:
    """Supported Parts, as csrc/layer.h reads them: biases and norms as they are now, kernels likewise."""

    def __init__(self, parts: Parts):
        self.parts = parts
        self.linears = parts.all_linears()
        self._address = _Addresses()
        self._selections: list[Selection] = []  # by which the structures' inputs are
        self._inputs: frozenset[int | None] = frozenset()
        self.structure, self._experts = _Layer(), _Experts()
        self._of_experts = (_Linear * (3 * len(parts.experts.linears) if parts.experts else 0))()
        self._structures: list[_Linear] = []  # parts of these two, one for each of `linears`
        self._fill()

    def __reduce__(self) -> tuple[type["NativeLayer"], tuple[Parts]]:
        """Copies point to the tensors of the copied parts."""
        return NativeLayer, (self.parts,)

    def inputs(self) -> frozenset[int | None]:
        """What the linear layers' kernels round inputs to now, as csrc/ numbers it; None among them for others."""
        selections = [linear.selection for linear in self.linears]
        if selections != self._selections:
            self._selections = selections
            inputs = [inputs_of(selection.kernel) for selection in selections]
            for to, own in zip(self._structures, inputs):
                to.inputs = -1 if own is None else own  # the library refuses -1
            self._inputs = frozenset(inputs)
        return self._inputs

    def _fill(self) -> None:
        parts, layer = self.parts, self.structure
        rows = [(layer.linears, parts.linears)]
        if (experts := parts.experts) is not None:
            rows.append((self._of_experts, tuple(each for row in experts.linears for each in row)))
            own = self._experts
            own.linears, own.router = ctypes.addressof(self._of_experts), self._address(experts.router)
            own.shared_gate = None if experts.shared_gate is None else self._address(experts.shared_gate)
            own.count, own.active, own.renormalized = len(experts.linears), experts.active, experts.renormalized
            layer.experts = ctypes.addressof(own)
        for structures, linears in rows:
            for to, linear in zip(structures, linears):
                if linear is not None:
                    _fill_linear(to, linear, self._address)
                    to.order = None if linear.order is None else self._order(linear.order)
                    self._structures.append(to)
        for place, norm in enumerate(parts.norms):
            if norm is not None:
                layer.norms[place] = _norm_structure(norm, self._address)
        layer.heads, layer.key_heads, layer.dim = parts.heads, parts.key_heads, parts.dim
        layer.activation, layer.scale, layer.cap = ACTIVATIONS.index(parts.activation), parts.scale, parts.cap or 0.0
        first = self.linears[0].packed
        assert isinstance(first, NativeWeight)
        layer.kernel = first.instructions

    def _order(self, order: Tensor) -> int:
        """Layers that read the same inputs in the same order have the same pointer: these are then quantized once."""
        same = (each for each in self._address.tensors if each.dtype == order.dtype and torch.equal(each, order))
        return self._address(next(same, order))


class _Addresses:
    """Gives tensors' addresses, and keeps the tensors."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def __call__(self, tensor: Tensor) -> int:
        self.tensors.append(tensor.contiguous())
        return self.tensors[-1].data_ptr()


def _fill_linear(to: _Linear, linear: QLinear, address: _Addresses) -> None:
    """Describe a linear layer to csrc/layer.h, but for the order of its inputs and what they are rounded to."""
    to.packed = address(linear.packed.get_buffer("data"))
    to.bias = None if linear.bias is None else address(linear.bias.detach().to(torch.float32))
    to.in_features, to.out_features = linear.in_features, linear.out_features


def _norm_structure(norm: Norm, address: _Addresses) -> _Norm:
    """A norm, as csrc/layer.h reads it."""
    bias = None if norm.bias is None else address(norm.bias)
    return _Norm(address(norm.weight), bias, norm.weight.numel(), norm.centered, norm.eps)


class NativeLayers:
    """Layers of as many features, one after the other, and the norm that their output goes through, or none."""

    def __init__(self, layers: Sequence[NativeLayer], norm: Norm | None = None):
        self.layers, self.norm = list(layers), norm
        self.hidden = layers[0].parts.hidden
        self._pointers = (_POINTER * len(layers))(*(ctypes.addressof(layer.structure) for layer in layers))
        self._address = _Addresses()
        self._norm = _Norm() if norm is None else _norm_structure(norm, self._address)
        self._function = _functions()[0]

    def __reduce__(self) -> tuple[type["NativeLayers"], tuple[list[NativeLayer], Norm | None]]:
        """Copies point to the structures of the copied layers."""
        return NativeLayers, (self.layers, self.norm)

    def inputs(self) -> frozenset[int | None]:
        """What the linear layers' kernels round inputs to now; see NativeLayer."""
        return frozenset[int | None]().union(*(layer.inputs() for layer in self.layers))

    def step(self, x: Tensor, contexts: Sequence[Context], length: int, first: Tensor | None = None) -> Tensor:
        """The output [batch, count, hidden] for each sequence's next tokens; appends their keys and values.

        A token sees those before it in its own sequence, and itself. Inputs are rounded as each linear layer's kernel
        does it now.

        Args:
            x: contiguous [batch, count, hidden], float32, float16 or bfloat16.
            contexts: one for each layer; tokens up to number `length` are filled in, or those of them that the next
                token's window reaches.
            first: contiguous int64 [batch], the first token of each sequence that counts; those before it are padding,
                which nothing sees and whose outputs mean nothing. None: 0 for all.
        """
        y = torch.empty_like(x)
        self.inputs()
        count, own = x.shape[1], _contexts(contexts, x.shape[1])
        arguments = _Step(
            x.data_ptr(), y.data_ptr(), ctypes.addressof(own), None if first is None else first.data_ptr(), self._norm,
            x.shape[0], count, length, DTYPES[x.dtype], torch.get_num_threads(),
        )  # fmt: skip
        self._check(self._function(self._pointers, len(self.layers), ctypes.addressof(arguments)), x, length)
        return y

    def _check(self, status: int, x: Tensor, length: int) -> None:
        if status:
            tokens = f"{x.shape[0] * x.shape[1]} tokens"
            raise MemoryError(f"no memory for {tokens} in decoder layers of {self.hidden} features and {length} keys")


def _contexts(contexts: Sequence[Context], count: int) -> "ctypes.Array[_Context]":
    """Contexts of a step of `count` tokens, as csrc/layer.h reads them."""
    own = (_Context * len(contexts))()
    for to, context in zip(own, contexts):
        keys, values = context.keys, context.values
        to.keys, to.values = keys["codes"].data_ptr(), values["codes"].data_ptr()
        to.capacity = keys["codes"].shape[2]
        to.start, to.window = context.start, context.window or 0
        if (coding := context.coding) is not None:
            to.key_scales, to.value_scales = keys["scales"].data_ptr(), values["scales"].data_ptr()
            to.cached, to.group = coding.number, coding.group
        if context.rotation is not None:
            cos, sin = context.rotation
            to.cos, to.sin, to.rotated = cos.data_ptr(), sin.data_ptr(), cos.shape[2]
            to.apart = 0 if cos.shape[0] == 1 else count * cos.shape[2]
    return own


class NativeDecoder:
    """The layers of a decoder, its embedding before them, its last norm and its head after them, for one token of one
    sequence at a time.

    Args:
        embedding: contiguous [vocabulary, hidden]; None: whoever calls has the rows.
        head: the weight [vocabulary, hidden] of a dense one, supported by dense_linear; or a quantized one, see
            head_unsupported.
        dtype: of embedding, a dense head, keys and values, and logits.
    """

    def __init__(self, layers: NativeLayers, embedding: Tensor | None, head: Tensor | QLinear, dtype: torch.dtype):
        self.layers, self.embedding, self.head, self.dtype = layers, embedding, head, dtype
        vocabulary = len(head) if isinstance(head, Tensor) else head.out_features
        with torch.inference_mode(False):  # what is made in that mode could not be written to outside of it
            self.logits = torch.empty((1, vocabulary), dtype=dtype)
            self.largest = torch.empty((1, 1))  # of the logits
            self._best, self._token = torch.empty(1, dtype=torch.int64), torch.empty(1, dtype=torch.int64)
            self._x, self._y = (torch.empty((1, 1, layers.hidden), dtype=dtype) for _ in range(2))
        self._address = _Addresses()
        own = self._around = _Around()
        own.logits, own.best, own.largest = self.logits.data_ptr(), self._best.data_ptr(), self.largest.data_ptr()
        own.tokens, own.vocabulary = self._token.data_ptr(), vocabulary
        own.embedding = None if embedding is None else embedding.data_ptr()
        if isinstance(head, Tensor):
            own.dense = head.data_ptr()
        else:
            _fill_linear(own.head, head, self._address)
        self._step = _Step()
        self._own = _contexts((), 1)
        self._function = _functions()[1]

    def __reduce__(self) -> tuple[type["NativeDecoder"], tuple[Any, ...]]:
        """Copies point to the copied tensors."""
        return NativeDecoder, (self.layers, self.embedding, self.head, self.dtype)

    def begin(self, contexts: Sequence[Context]) -> None:
        """From now on, tokens are read with these keys and values; rotations come with each token."""
        self._contexts, self._own = list(contexts), _contexts(contexts, 1)
        self.layers.inputs()
        if isinstance(self.head, QLinear):
            inputs = inputs_of(self.head.selection.kernel)
            self._around.head.inputs = -1 if inputs is None else inputs
        self._step = _Step(
            self._x.data_ptr(), self._y.data_ptr(), ctypes.addressof(self._own), None, self.layers._norm, 1, 1, 0,
            DTYPES[self.dtype], torch.get_num_threads(),
        )  # fmt: skip

    def next(self, token: int, length: int, rotations: Sequence[tuple[Tensor, Tensor] | None], x: Tensor | None) -> int:
        """The first token of the largest logit after `token`, number `length`; fills `logits` and `largest`.

        Args:
            rotations: of each layer, see Context.
            x: the token's row [1, 1, hidden]; None where there is an embedding.
        Raises:
            IndexError: the embedding has no row of the token.
        """
        if self.embedding is not None and not 0 <= token < len(self.embedding):
            raise IndexError(f"token {token} has no row in an embedding of {len(self.embedding)}")
        for to, rotation in zip(self._own, rotations):
            if rotation is not None:
                to.cos, to.sin, to.rotated = rotation[0].data_ptr(), rotation[1].data_ptr(), rotation[0].shape[2]
        if x is not None:
            self._x.copy_(x)
        self._token[0] = token
        self._step.length = length
        layers = self.layers
        status = self._function(
            layers._pointers, len(layers.layers), ctypes.addressof(self._step), ctypes.addressof(self._around)
        )
        layers._check(status, self._x, length)
        return int(self._best)


def head_unsupported(head: QLinear) -> str | None:
    """Why NativeDecoder cannot multiply by a quantized head, in a few words; None if it can."""
    if not isinstance(head.packed, NativeWeight):
        return f"the head runs on {head.selection.kernel.name}"
    if head.order is not None or head.joined is not None or rounds_inputs(head.scheme):
        return "the head's inputs are reordered, or rounded by rows"
    return None
