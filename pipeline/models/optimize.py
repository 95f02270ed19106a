"""A faster model: on the CPU, one call runs a whole decoder layer; on GPUs, projections are joined.

The model stays as transformers made it. On the CPU a layer gets another forward, which looks at its arguments. Tokens
that see those before them, with a key-value cache that grows or none, and nothing else wanted, go to NativeLayer
(csrc/layer.c): a prompt or a piece of it, and one token or several of a batch. Everything else goes to the layer's own
forward. A layer is changed only after both gave the same output and the same keys and values.
"""

import weakref
from collections import Counter
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from bitpress.eval.measure.cache import cache_name
from bitpress.kernels.cpu.native import DTYPES, FLOAT32
from bitpress.kernels.decoder_layer import ACTIVATIONS, NativeLayer, Norm, Parts
from bitpress.kernels.linear import QLinear, join_projections

from .structure import decoder

_ROOM = 256  # tokens that a cache grows by, at least; an eighth of what it holds where that is more
# Inputs of 16 bits that are to stay as they are: from so many rows on, torch's product with a dequantized weight is the
# faster one. A layer of SmolLM2 on Zen 4 takes 36 ms by it and 49 in one call for 512 rows, 8.2 and 5.7 for 64.
_LONG = 192
_PASSED = {"attention_mask", "position_ids", "cache", "past_key_values", "use_cache", "position_embeddings"}
_CAPTURING = "transformers.utils.output_capturing"  # whose hooks stay, but do nothing unless outputs are asked for
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_LINEARS = (*_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_KNOWN = {*_LINEARS, *_NORMS, *_HEAD_NORMS, "self_attn", "mlp", "mlp.act_fn"}

# Relative to the layer's update, in float32: rounding flips an activation's int8 code here and there, which changes a
# sum of products by the order of 1e-4; another formula changes it by more than this.
_TOLERANCE = 5e-3
_EXACT_TOLERANCE = 1e-5  # of norms and activations, which are compared by themselves
# A layer is tried with two sequences, from place 40 on: 4 tokens at once, then one, then 2. The second sequence's first
# token is padding.
_PIECES, _POSITION, _FIRST = (4, 1, 2), 40, (0, 1)


@dataclass(frozen=True)
class Fusing:
    """How many of the model's `of` decoder layers run in one call. why: reason against it -> number of layers."""

    fused: int
    of: int
    why: dict[str, int]


class _Unfit(Exception):
    """Why a layer is left as it is."""


def optimize_for_decoding(model: PreTrainedModel) -> None:
    """Speed up a model whose layers are all in place.

    On the CPU, decoder layers run in one call where they can. On GPUs, projections of one input become one product.
    """
    devices = {layer.device.type for layer in model.modules() if isinstance(layer, QLinear)}
    split = len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1
    if devices == {"cpu"} and not split:
        model.fusing = fuse(model)  # type: ignore[assignment]
    else:
        join_projections(model)


def fuse(model: PreTrainedModel) -> Fusing:
    """Let decoder layers run in one call, those that can; the others stay as they are."""
    path = decoder(model)
    layers = list(model.get_submodule(path).children())
    rotary = getattr(model.get_submodule(path.rpartition(".")[0]), "rotary_emb", None)
    why: Counter[str] = Counter()
    masks = _Masks()
    for layer in layers:
        try:
            parts = _parts(layer)
            if reason := parts.unsupported():
                raise _Unfit(reason)
            if any("forward" in module.__dict__ for module in layer.modules()):
                raise _Unfit("its forward was replaced")
            step = _Decoding(layer, NativeLayer(parts), masks)
            _try(layer, step, rotary, model.config)
        except _Unfit as reason:
            why[str(reason)] += 1
        else:
            layer.decoding = step  # type: ignore[assignment]
            layer.forward = MethodType(_forward, layer)
    return Fusing(len(layers) - why.total(), len(layers), dict(why))


def unfuse(model: nn.Module) -> None:
    """Give every layer its own forward back."""
    for layer in model.modules():
        if isinstance(layer.__dict__.get("decoding"), _Decoding):
            del layer.forward, layer.decoding


def _forward(layer: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Stands in the place of a decoder layer's forward."""
    step = layer.__dict__["decoding"]
    if not args and step.serves(hidden_states, kwargs):
        return step(hidden_states, kwargs)
    return type(layer).forward(layer, hidden_states, *args, **kwargs)


class GrowingLayer(DynamicLayer):
    """A layer's cache whose keys and values are views of larger tensors, until someone else replaces them."""

    def __init__(self, layer: DynamicLayer):
        super().__init__()
        self.__dict__.update(layer.__dict__)
        self.room: tuple[Tensor, Tensor] | None = None
        self.seen: tuple[Tensor, Tensor] | None = None

    def make_room(self, like: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, heads, capacity, dim] that begin with the cache's, and have room for `count` tokens.

        Args:
            like: [batch, heads, 0, dim], what an empty cache is to hold.
        """
        if not self.is_initialized or self.keys is None or self.keys.numel() == 0:
            self.lazy_initialization(like, like)
            self.keys, self.values = like, like
        assert self.keys is not None
        assert self.values is not None
        length = self.keys.shape[2]
        ours = self.seen is not None and self.keys is self.seen[0] and self.values is self.seen[1]
        if self.room is None or not ours or self.room[0].shape[2] < length + count:
            self.room = (_with_room(self.keys, count), _with_room(self.values, count))
        return self.room

    def advance(self, count: int) -> None:
        """So many tokens after the last are in the room now."""
        assert self.keys is not None
        assert self.room is not None
        length = self.keys.shape[2] + count
        self.keys, self.values = self.seen = (self.room[0].narrow(2, 0, length), self.room[1].narrow(2, 0, length))


def _with_room(states: Tensor, count: int) -> Tensor:
    batch, heads, length, dim = states.shape
    with torch.inference_mode(False):  # what is made in that mode could not be continued outside of it
        larger = torch.empty((batch, heads, length + count + max(_ROOM, length // 8), dim), dtype=states.dtype)
    larger[:, :, :length] = states
    return larger


class _Masks:
    """Reads attention masks, each once for all layers of a forward."""

    def __init__(self) -> None:
        self.last: tuple[weakref.ref[Tensor], int, Tensor | None] | None = None

    def first(self, mask: Tensor, batch: int, count: int) -> Tensor | None:
        """int64 [batch], the first place that each sequence's tokens see.

        None where the mask is not that of tokens that see those before them, from a first place on, and themselves.

        Args:
            mask: of the last `count` places; only bool [batch, 1, count, places] can be such a mask.
        """
        if mask.is_inference():  # changes of such a one are not counted
            return self._read(mask, batch, count)
        last = self.last
        if last is None or last[0]() is not mask or last[1] != mask._version:
            last = self.last = (weakref.ref(mask), mask._version, self._read(mask, batch, count))
        return last[2]

    @staticmethod
    def _read(mask: Tensor, batch: int, count: int) -> Tensor | None:
        if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[:3] != (batch, 1, count):
            return None
        places = torch.arange(mask.shape[3])
        first = mask[:, 0, -1].to(torch.uint8).argmax(-1)
        seen = (places >= first.view(-1, 1, 1)) & (places <= places[-count:].unsqueeze(1))
        return first if torch.equal(mask[:, 0], seen) else None


class _Decoding:
    """How a layer runs in one call. It steps aside when the modules below it are not those that were compared."""

    def __init__(self, layer: nn.Module, native: NativeLayer, masks: _Masks):
        self.layer, self.native, self.masks = layer, native, masks
        attention: Any = layer.get_submodule("self_attn")
        self.index, self.config = int(attention.layer_idx), attention.config
        self.children: list[tuple[dict, dict]] | None = None
        self.hooks: list[dict] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copy looks at the modules of the copied layer, which are not there yet when it is made."""
        return {**self.__dict__, "children": None, "hooks": []}

    def serves(self, x: Tensor, arguments: dict[str, Any]) -> bool:
        """Whether these are tokens that see those before them, and nothing but the next hidden state is wanted.

        Args:
            x: the layer's input. arguments: the keyword arguments of the layer's forward.
        """
        if x.dim() != 3 or x.shape[2] != self.native.hidden or x.dtype not in DTYPES or not x.numel():
            return False
        if torch.compiler.is_compiling() or type(x) is not Tensor or self.layer.training:
            return False
        if x.requires_grad or (torch.is_grad_enabled() and any(p.requires_grad for p in self.layer.parameters())):
            return False
        if arguments.get("is_causal") is not None or any(arguments[name] for name in arguments.keys() - _PASSED):
            return False
        (batch, count, _), dim = x.shape, self.native.parts.dim
        rotation = arguments.get("position_embeddings")
        if not isinstance(rotation, tuple) or len(rotation) != 2:
            return False
        shapes = {tuple(table.shape) for table in rotation}
        if shapes not in ({(1, count, dim)}, {(batch, count, dim)}) or any(t.dtype != x.dtype for t in rotation):
            return False
        if (length := self._length(_cache_in(arguments), x)) is None:
            return False
        mask = arguments.get("attention_mask")
        if (mask is None and count > 1 and length) or self.config._attn_implementation != "sdpa":
            return False
        if mask is not None and (mask.shape[-1] != length + count or self.masks.first(mask, batch, count) is None):
            return False
        inputs = self.native.inputs()
        if None in inputs or (FLOAT32 in inputs and x.dtype != torch.float32 and batch * count >= _LONG):
            return False
        return self._untouched()

    def _length(self, cache: Any, x: Tensor) -> int | None:
        """How many tokens the cache of this layer holds; None where it is another kind of cache, or another's."""
        if cache is None:
            return 0
        if type(cache) is not DynamicCache or cache.offloading or len(cache.layers) <= self.index:
            return None
        layer: Any = cache.layers[self.index]
        if type(layer) not in (DynamicLayer, GrowingLayer):
            return None
        if not layer.is_initialized or layer.keys.numel() == 0:
            return 0
        if layer.keys.dim() != 4 or not layer.keys.dtype == layer.values.dtype == x.dtype:
            return None
        batch, heads, length, width = layer.keys.shape
        return length if (batch, heads, width) == (len(x), self.native.key_heads, self.native.parts.dim) else None

    def _untouched(self) -> bool:
        """Whether the modules below the layer are those that were compared, and nobody else hooked into them."""
        if self.children is None:
            modules = list(self.layer.modules())
            self.children = [(module._modules, dict(module._modules)) for module in modules if module._modules]
            self.hooks = [hooks for m in modules[1:] for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        if any(now != then for now, then in self.children):
            return False
        return not any(hook.__module__ != _CAPTURING for hooks in self.hooks if hooks for hook in hooks.values())

    def __call__(self, x: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The layer's output, where `serves` these; their keys and values are in the cache then."""
        cos, sin = arguments["position_embeddings"]
        cache, mask = _cache_in(arguments), arguments.get("attention_mask")
        batch, count, _ = x.shape
        first = None if mask is None else self.masks.first(mask, batch, count)
        shape = (batch, self.native.key_heads, 0 if cache is not None else count, self.native.parts.dim)
        states = torch.empty(shape, dtype=x.dtype)
        if cache is None:
            keys, values, length = states, torch.empty_like(states), 0
        else:
            layer: Any = cache.layers[self.index]
            if type(layer) is DynamicLayer:
                layer = cache.layers[self.index] = GrowingLayer(layer)
            keys, values = layer.make_room(states, count)
            length = layer.keys.shape[2]
        rotation = (cos.contiguous(), sin.contiguous())
        y = self.native.step(x.contiguous(), rotation, keys, values, length, first)
        if cache is not None:
            layer.advance(count)
        return y


def _cache_in(arguments: dict[str, Any]) -> Any:
    """The cache among a layer's arguments: `cache` from transformers 5.24 on, `past_key_values` before."""
    return arguments["cache"] if "cache" in arguments else arguments.get("past_key_values")


def _parts(layer: nn.Module) -> Parts:
    """The parts of a layer, by its modules' names and by what they compute.

    Raises:
        _Unfit: a part is missing, or the layer has another one.
    """
    modules = dict(layer.named_modules())
    for name in (*_LINEARS, *_NORMS):
        if name not in modules:
            raise _Unfit(f"it has no {name}")
    for name in _LINEARS:
        if not isinstance(modules[name], QLinear):
            raise _Unfit(f"{name} is not quantized")
    for name in sorted(modules.keys() - _KNOWN - {""}):
        if not name.startswith(_LINEARS):
            raise _Unfit(f"it has a {name}, which a Llama's layer has not")
    attention: Any = modules["self_attn"]
    dim, scale = getattr(attention, "head_dim", None), getattr(attention, "scaling", None)
    if not isinstance(dim, int) or not isinstance(scale, float):
        raise _Unfit("self_attn does not say its head_dim and scaling")
    if attention.config._attn_implementation != "sdpa":
        raise _Unfit(f"attention is {attention.config._attn_implementation}, not sdpa")
    norms = [_norm(name, modules[name]) for name in _NORMS]
    of_heads = [_norm(name, modules[name]) if name in modules else None for name in _HEAD_NORMS]
    linears = tuple(modules[name] for name in _LINEARS)
    return Parts(linears, (*norms, *of_heads), dim, scale, _activation(modules.get("mlp.act_fn")))  # type: ignore[arg-type]


def _norm(name: str, module: nn.Module) -> Norm:
    """The weight and epsilon of an RMS norm. The weight is the output for ones: some norms store it less 1.

    Raises:
        _Unfit: it computes something else.
    """
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        raise _Unfit(f"{name} is not an RMS norm")
    ones = torch.ones(weight.numel())
    norm = Norm(module(ones).to(torch.float32) * (1 + eps) ** 0.5, eps)
    x = torch.randn(weight.numel(), generator=torch.Generator().manual_seed(0)) * eps**0.5  # so small that eps counts
    expected = x * torch.rsqrt(x.square().mean() + eps) * norm.weight
    if not _close(module(x), expected, _EXACT_TOLERANCE):
        raise _Unfit(f"{name} is not an RMS norm")
    return norm


def _activation(module: nn.Module | None) -> str:
    """The name of an activation function, by what it computes.

    Raises:
        _Unfit: NativeLayer has no such function.
    """
    if module is None:
        raise _Unfit("mlp has no act_fn")
    x = torch.linspace(-8, 8, 1001)
    for name, expected in zip(ACTIVATIONS, (F.silu(x), F.gelu(x, approximate="tanh"))):
        if _close(module(x), expected, _EXACT_TOLERANCE):
            return name
    raise _Unfit(f"mlp.act_fn is {type(module).__name__}")


def _close(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether two tensors differ by less than `tolerance`, relative to the norm; NaN is close to nothing."""
    return bool((got - expected).norm() <= tolerance * expected.norm())


@torch.inference_mode()
def _try(layer: nn.Module, step: _Decoding, rotary: nn.Module | None, config: PreTrainedConfig) -> None:
    """Run random rows through a layer's own forward and through the native one.

    Raises:
        _Unfit: they differ, or the layer cannot be run by itself.
    """
    if rotary is None:
        raise _Unfit("the model has no rotary_emb")
    count, first = sum(_PIECES), torch.tensor(_FIRST)
    x = torch.randn(len(first), count, step.native.hidden, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(_POSITION, _POSITION + count).unsqueeze(0)
    places = torch.arange(count)
    seen = (places <= places.unsqueeze(1)) & (places >= first.view(-1, 1, 1, 1))
    name = cache_name(layer) or "past_key_values"
    theirs: Any = DynamicCache(config=config)
    ours: Any = DynamicCache(config=config)
    try:
        cos, sin = rotary(x, positions)
        start = 0
        for piece in _PIECES:
            end = start + piece
            arguments = {
                "attention_mask": seen[:, :, start:end, :end],
                "position_embeddings": (cos[:, start:end], sin[:, start:end]),
            }
            rows = x[:, start:end]
            expected = type(layer).forward(
                layer, rows, position_ids=positions[:, start:end], use_cache=True, **{name: theirs}, **arguments
            )
            if not step.serves(rows, {name: ours, **arguments}):
                raise _Unfit(f"its cache is a {type(ours.layers[step.index]).__name__}")
            got = step(rows, {name: ours, **arguments})
            real = places[start:end] >= first.unsqueeze(1)
            _compare((got - rows)[real], (expected - rows)[real])
            start = end
    except (TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        raise _Unfit(f"it cannot be tried by itself: {error}") from error
    for name in ("keys", "values"):
        states, right = (getattr(cache.layers[step.index], name) for cache in (ours, theirs))
        real = (places >= first.unsqueeze(1)).unsqueeze(1).expand(states.shape[:3])
        _compare(states[real], right[real])


def _compare(got: Tensor, expected: Tensor) -> None:
    if not _close(got, expected, _TOLERANCE):
        raise _Unfit("it computes something else than a Llama's layer")
