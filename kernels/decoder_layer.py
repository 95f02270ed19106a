"""What Llama-like decoder layers do for the next tokens of some sequences, in one call of csrc/layer.c.

Python and transformers take about as long for the hundred small operations of a layer as its quantized weights take to
be read. Here they are one, for a layer or for all of them: from the input to the output everything is float32, where a
model rounds to its own dtype after every operation; keys and values are kept in the model's dtype.
"""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cpu.library import Library, library
from .cpu.native import DTYPES, NativeWeight, inputs_of, rounds_inputs
from .linear import QLinear
from .registry import Selection

ACTIVATIONS = ("silu", "gelu_tanh")

_POINTER, _INT64, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_LANES = 16  # of the widest registers


@dataclass(frozen=True)
class Norm:
    """x / sqrt(mean(x^2) + eps) * weight; `weight` float32 [features]."""

    weight: Tensor
    eps: float


@dataclass(frozen=True)
class Parts:
    """A decoder layer: x += o(attention(q, k, v of norm(x))), x += down(activation(gate) * up of norm(x)).

    linears: q, k, v, o, gate, up, down, with or without bias. norms: of the input and after attention, then those of
    each head's queries and keys, or None. Heads have `dim` features, rotated in halves; queries are multiplied by
    `scale`; heads of q that follow each other share a head of k and v.
    """

    linears: tuple[QLinear, ...]
    norms: tuple[Norm, Norm, Norm | None, Norm | None]
    dim: int
    scale: float
    activation: str

    def unsupported(self) -> str | None:
        """Why NativeLayer cannot run it, in a few words; None if it can."""
        for layer in self.linears:
            if not isinstance(layer.packed, NativeWeight):
                return f"a linear layer runs on {layer.selection.kernel.name}"
            if rounds_inputs(layer.scheme):
                return f"the inputs of {layer.scheme.name} are rounded by rows, or to FP8"
        q, k, _, _, gate, _, _ = self.linears
        queries, keys, hidden, inner = q.out_features, k.out_features, q.in_features, gate.out_features
        if self.dim % _LANES or queries % self.dim or keys % self.dim:
            return f"heads of {self.dim} features; expected a multiple of {_LANES}"
        if queries % keys:
            return f"{keys} features of keys to {queries} of queries"
        shapes = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
        shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
        widths = [norm.weight.numel() for norm in self.norms if norm]
        if shapes != [(layer.out_features, layer.in_features) for layer in self.linears]:
            return "linear layers that do not fit each other"
        if widths != [hidden, hidden, self.dim, self.dim][: len(widths)]:
            return "norms that do not fit the linear layers"
        if self.activation not in ACTIVATIONS:
            return f"activation {self.activation}; expected {' or '.join(ACTIVATIONS)}"
        return None


class _Linear(ctypes.Structure):
    _fields_ = (
        ("packed", _POINTER), ("bias", _POINTER), ("order", _POINTER), ("in_features", _INT64),
        ("out_features", _INT64), ("inputs", _INT64),
    )  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = (
        ("linears", _Linear * 7), ("norms", _POINTER * 4), ("heads", _INT64), ("key_heads", _INT64), ("dim", _INT64),
        ("activation", _INT64), ("kernel", _INT64), ("eps", _FLOAT * 4), ("scale", _FLOAT),
    )  # fmt: skip


class _Cache(ctypes.Structure):
    _fields_ = (("keys", _POINTER), ("values", _POINTER), ("capacity", _INT64))


class _Step(ctypes.Structure):
    _fields_ = (
        ("x", _POINTER), ("cos", _POINTER), ("sin", _POINTER), ("y", _POINTER), ("caches", _POINTER),
        ("first", _POINTER), ("norm", _POINTER), ("batch", _INT64), ("count", _INT64), ("length", _INT64),
        ("rotations", _INT64), ("dtype", _INT64), ("eps", _FLOAT), ("threads", ctypes.c_int),
    )  # fmt: skip


@functools.cache
def _function() -> "ctypes._NamedFuncPointer":
    native = library()
    assert isinstance(native, Library)
    function = native.lib.bitpress_layers_step
    function.argtypes = [_POINTER, _INT64, _POINTER]
    return function


class NativeLayer:
    """Supported Parts, as csrc/layer.c reads them: biases and norms as they are now, kernels likewise."""

    def __init__(self, parts: Parts):
        self.parts = parts
        self.hidden = parts.linears[0].in_features
        self.key_heads = parts.linears[1].out_features // parts.dim
        self._tensors: list[Tensor] = []  # that the structure points to
        self.structure = self._structure()

    def __reduce__(self) -> tuple[type["NativeLayer"], tuple[Parts]]:
        """Copies point to the tensors of the copied parts."""
        return NativeLayer, (self.parts,)

    def _structure(self) -> _Layer:
        parts, layer = self.parts, _Layer()
        first = parts.linears[0]
        assert isinstance(first.packed, NativeWeight)
        for to, linear in zip(layer.linears, parts.linears):
            to.packed = self._pointer(linear.packed.get_buffer("data"))
            to.bias = None if linear.bias is None else self._pointer(linear.bias.detach().to(torch.float32))
            to.order = None if linear.order is None else self._order(linear.order)
            to.in_features, to.out_features = linear.in_features, linear.out_features
        for place, norm in enumerate(parts.norms):
            if norm is not None:
                layer.norms[place], layer.eps[place] = self._pointer(norm.weight), norm.eps
        layer.heads, layer.key_heads = parts.linears[0].out_features // parts.dim, self.key_heads
        layer.dim, layer.activation, layer.scale = parts.dim, ACTIVATIONS.index(parts.activation), parts.scale
        layer.kernel = first.packed.instructions
        return layer

    def _order(self, order: Tensor) -> int:
        """Layers that read the same inputs in the same order have the same pointer: these are then quantized once."""
        same = (each for each in self._tensors if each.dtype == order.dtype and torch.equal(each, order))
        return self._pointer(next(same, order))

    def _pointer(self, tensor: Tensor) -> int:
        self._tensors.append(tensor.contiguous())
        return self._tensors[-1].data_ptr()


class NativeLayers:
    """Layers of as many features, one after the other, and the norm that their output goes through, or none."""

    def __init__(self, layers: Sequence[NativeLayer], norm: Norm | None = None):
        self.layers, self.norm = list(layers), norm
        self.hidden = layers[0].hidden
        self._structures = [_Layer.from_buffer_copy(layer.structure) for layer in layers]
        self._pointers = (_POINTER * len(layers))(*map(ctypes.addressof, self._structures))
        self._linears = [linear for layer in layers for linear in layer.parts.linears]
        self._selections: list[Selection] = []  # by which the structures' inputs are
        self._inputs: frozenset[int | None] = frozenset()
        self._function = _function()

    def __reduce__(self) -> tuple[type["NativeLayers"], tuple[list[NativeLayer], Norm | None]]:
        """Copies point to the structures of the copied layers."""
        return NativeLayers, (self.layers, self.norm)

    def inputs(self) -> frozenset[int | None]:
        """What the linear layers' kernels round inputs to now, as csrc/ numbers it; None among them for others."""
        selections = [linear.selection for linear in self._linears]
        if selections != self._selections:
            self._selections = selections
            inputs = [inputs_of(selection.kernel) for selection in selections]
            places = (to for structure in self._structures for to in structure.linears)
            for to, own in zip(places, inputs):
                to.inputs = -1 if own is None else own  # the library refuses -1
            self._inputs = frozenset(inputs)
        return self._inputs

    def step(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        caches: Sequence[tuple[Tensor, Tensor]],
        length: int,
        first: Tensor | None = None,
    ) -> Tensor:
        """The output [batch, count, hidden] for each sequence's next tokens; appends their keys and values.

        A token sees those before it in its own sequence, and itself. Inputs are rounded as each linear layer's kernel
        does it now.

        Args:
            x: contiguous [batch, count, hidden], float32, float16 or bfloat16; so are all others.
            rotation: cos and sin [batch or 1, count, dim], contiguous.
            caches: of each layer, keys and values: contiguous [batch, key_heads, capacity, dim]; `length` of them are
                filled, and there is room for `count` more.
            first: contiguous int64 [batch], the first place of each sequence that counts; those before it are padding,
                which nothing sees and whose outputs mean nothing. None: 0 for all.
        """
        y = torch.empty_like(x)
        cos, sin = rotation
        self.inputs()
        places = (_Cache * len(caches))(*(_Cache(k.data_ptr(), v.data_ptr(), k.shape[2]) for k, v in caches))
        arguments = _Step(
            x.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr(), ctypes.addressof(places),
            None if first is None else first.data_ptr(), None if self.norm is None else self.norm.weight.data_ptr(),
            x.shape[0], x.shape[1], length, 0 if cos.shape[0] == 1 else x.shape[1] * cos.shape[2], DTYPES[x.dtype],
            0.0 if self.norm is None else self.norm.eps, torch.get_num_threads(),
        )  # fmt: skip
        if self._function(self._pointers, len(self.layers), ctypes.addressof(arguments)):
            tokens = f"{x.shape[0] * x.shape[1]} tokens"
            raise MemoryError(f"no memory for {tokens} in decoder layers of {self.hidden} features and {length} keys")
        return y
