"""A faster model: on the CPU, one call runs a whole decoder layer; on GPUs, projections are joined.

The model stays as transformers made it. On the CPU a layer gets another forward, which looks at its arguments. Tokens
that see those before them, with a key-value cache that grows or none, and nothing else wanted, go to NativeLayers
(csrc/layer.c): a prompt or a piece of it, and one token or several of a batch. Everything else goes to the layer's own
forward. A layer is changed only after both gave the same output and the same keys and values.

Where all layers of a decoder are changed, it gets another forward itself, by which all of them and the last norm are
one call; again after both gave the same output, and only for what the layers serve.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from bitpress.eval.measure.cache import cache_name
from bitpress.kernels.cpu.native import DTYPES, FLOAT32, dense_linear, dense_unsupported
from bitpress.kernels.decoder_layer import ACTIVATIONS, NativeLayer, NativeLayers, Norm, Parts
from bitpress.kernels.linear import QLinear, join_projections

from .kv_cache import rounds_cache
from .structure import decoder

_ROOM = 256  # tokens that a cache grows by, at least; an eighth of what it holds where that is more
# Inputs of 16 bits that are to stay as they are: from so many rows on, torch's product with a dequantized weight is the
# faster one. A layer of SmolLM2 on Zen 4 takes 36 ms by it and 49 in one call for 512 rows, 8.2 and 5.7 for 64.
_LONG = 192
_STATES = ("keys", "values", "room", "_length", "_states")
# Up to so many rows, and numbers in them, a dense head's product is the library's. On two cores of Zen 4, with torch's:
# 1 row of SmolLM2 (49152 x 576) 1.7 and 3.7 ms, 4 rows 2.4 and 4.1; of 32000 x 2048 3.6 and 6.8, 4 rows 10.0 and 6.4.
_HEAD_ROWS, _HEAD_NUMBERS = 4, 4096
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
_HEAD_TOLERANCE = 2.0**-7  # relative RMS: each logit is rounded to bfloat16, at most by 2^-9, in both
_EXACT_TOLERANCE = 1e-5  # of norms and activations, which are compared by themselves
# A layer is tried with two sequences, from place 40 on: 4 tokens at once, then one, then 2. The second sequence's first
# token is padding.
_PIECES, _POSITION, _FIRST = (4, 1, 2), 40, (0, 1)


@dataclass(frozen=True)
class Fusing:
    """How many of the model's `of` decoder layers run in one call. why: reason against it -> number of layers.

    apart: why all layers together do not run in one call, though each does; None if they do, or some layers do not.
    """

    fused: int
    of: int
    why: dict[str, int]
    apart: str | None = None


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
    """Let decoder layers run in one call, those that can; the others stay as they are. A dense head may change too."""
    _fuse_head(model)
    path = decoder(model)
    layers = list(model.get_submodule(path).children())
    base = model.get_submodule(path.rpartition(".")[0])
    rotary = getattr(base, "rotary_emb", None)
    why: Counter[str] = Counter()
    masks = _Masks()
    steps: list[_Decoding] = []
    for layer in layers:
        try:
            parts = _parts(layer)
            if reason := parts.unsupported():
                raise _Unfit(reason)
            if any("forward" in module.__dict__ for module in layer.modules()):
                raise _Unfit("its forward was replaced")
            if rounds_cache(layer):
                raise _Unfit("its keys and values are rounded for the cache")
            step = _Decoding(layer, NativeLayers([NativeLayer(parts)]), masks)
            _try(layer, step, rotary, model.config)
        except _Unfit as reason:
            why[str(reason)] += 1
        else:
            steps.append(step)
            layer.decoding = step  # type: ignore[assignment]
            layer.forward = MethodType(_forward, layer)
    if why:
        return Fusing(len(layers) - why.total(), len(layers), dict(why))
    apart = None
    try:
        whole = _WholeDecoder(base, steps, _layers_alone(base, path.rpartition(".")[2]))
        _try_whole(base, whole)
    except _Unfit as reason:
        apart = str(reason)
    else:
        base.decoding = whole  # type: ignore[assignment]
        base.forward = MethodType(_forward_of_all, base)
    return Fusing(len(layers), len(layers), {}, apart)


def unfuse(model: nn.Module) -> None:
    """Give every layer, the decoder and the head their own forward back."""
    for module in model.modules():
        if isinstance(module.__dict__.get("decoding"), _Decoding | _WholeDecoder | _Head):
            del module.forward, module.decoding


def _forward(layer: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Stands in the place of a decoder layer's forward."""
    step = layer.__dict__["decoding"]
    if not args and step.serves(hidden_states, kwargs):
        return step(hidden_states, kwargs)
    return type(layer).forward(layer, hidden_states, *args, **kwargs)


def _forward_of_all(base: nn.Module, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    """Stands in the place of a decoder's forward."""
    if not args and (output := base.__dict__["decoding"](input_ids, **kwargs)) is not None:
        return output
    return type(base).forward(base, input_ids, *args, **kwargs)


class GrowingLayer(DynamicLayer):
    """A layer's cache whose keys and values are views of larger tensors, until someone else replaces them.

    The views are made when somebody asks for them.
    """

    def __init__(self, layer: DynamicLayer):
        self.room: tuple[Tensor, Tensor] | None = None
        self._length = 0  # of what is filled in the room
        self._states: list[Any] | None = [None, None]  # keys and values; None: views of the room
        super().__init__()
        self.__dict__.update({name: value for name, value in layer.__dict__.items() if name not in _STATES})
        self.keys, self.values = layer.keys, layer.values

    def _both(self) -> list[Any]:
        if self._states is None:
            assert self.room is not None
            self._states = [states.narrow(2, 0, self._length) for states in self.room]
        return self._states

    def _replace(self, place: int, states: Tensor | None) -> None:
        both = list(self._both())
        both[place] = states
        self._states, self.room = both, None

    keys = property(lambda self: self._both()[0], lambda self, states: self._replace(0, states))
    values = property(lambda self: self._both()[1], lambda self, states: self._replace(1, states))

    def make_room(self, like: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, heads, capacity, dim] that begin with the cache's, and have room for `count` tokens.

        Args:
            like: [batch, heads, 0, dim], what an empty cache is to hold.
        """
        if self.room is None or self.room[0].shape[2] < self._length + count:
            keys, values = self._both()
            if not self.is_initialized or keys is None or keys.numel() == 0:
                self.lazy_initialization(like, like)
                keys = values = like
            self._length = keys.shape[2]
            self.room = (_with_room(keys, count), _with_room(values, count))
            self._states = None
        return self.room

    def advance(self, count: int) -> None:
        """So many tokens after the last are in the room now."""
        assert self.room is not None
        self._length += count
        self._states = None


def filled(layer: Any, batch: int, heads: int, dim: int, dtype: torch.dtype) -> int | None:
    """How many tokens a layer's cache holds; None where it is of another kind, shape or dtype."""
    if type(layer) is GrowingLayer and layer.room is not None:
        states, length = layer.room, layer._length
    elif type(layer) not in (DynamicLayer, GrowingLayer):
        return None
    elif not layer.is_initialized or layer.keys is None or layer.keys.numel() == 0:
        return 0
    else:
        states, length = (layer.keys, layer.values), layer.keys.shape[-2]
    if states[0].dim() != 4 or not states[0].dtype == states[1].dtype == dtype:
        return None
    shape = states[0].shape
    return length if (shape[0], shape[1], shape[3]) == (batch, heads, dim) else None


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


def _native_takes(x: Tensor, native: NativeLayers, module: nn.Module) -> bool:
    """Whether `native` takes hidden states [batch, count, hidden] as they are, and is faster with them than torch.

    Args:
        module: what native stands for; no gradient of its parameters may be wanted.
    """
    if type(x) is not Tensor or x.dim() != 3 or x.shape[2] != native.hidden or x.dtype not in DTYPES or not x.numel():
        return False
    if x.requires_grad or (torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())):
        return False
    inputs = native.inputs()
    return None not in inputs and not (
        FLOAT32 in inputs and x.dtype != torch.float32 and x.shape[0] * x.shape[1] >= _LONG
    )


class _Decoding:
    """How a layer runs in one call. It steps aside when the modules below it are not those that were compared."""

    def __init__(self, layer: nn.Module, native: NativeLayers, masks: _Masks):
        self.layer, self.native, self.masks = layer, native, masks
        self.key_heads, self.dim = native.layers[0].key_heads, native.layers[0].parts.dim
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
        if torch.compiler.is_compiling() or self.layer.training or not _native_takes(x, self.native, self.layer):
            return False
        if arguments.get("is_causal") is not None or any(arguments[name] for name in arguments.keys() - _PASSED):
            return False
        (batch, count, _), dim = x.shape, self.dim
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
        return self._untouched()

    def _length(self, cache: Any, x: Tensor) -> int | None:
        """How many tokens the cache of this layer holds; None where it is another kind of cache, or another's."""
        if cache is None:
            return 0
        if type(cache) is not DynamicCache or cache.offloading or len(cache.layers) <= self.index:
            return None
        return filled(cache.layers[self.index], len(x), self.key_heads, self.dim, x.dtype)

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
        length = self._length(cache, x)
        assert length is not None
        rotation = (cos.contiguous(), sin.contiguous())
        with _room_for(cache, [self], x) as rooms:
            return self.native.step(x.contiguous(), rotation, rooms, length, first)


@contextmanager
def _room_for(cache: Any, steps: "list[_Decoding]", x: Tensor) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Keys and values of these layers with room for x [batch, count, hidden]; at the end they are the cache's.

    Each layer has its own, without a cache too: the first tokens are through all layers before the next ones begin.
    """
    count = x.shape[1]
    rooms: list[tuple[Tensor, Tensor]] = []
    growing: list[GrowingLayer] = []
    for step in steps:
        states = torch.empty((len(x), step.key_heads, 0 if cache is not None else count, step.dim), dtype=x.dtype)
        if cache is None:
            rooms.append((states, torch.empty_like(states)))
            continue
        layer: Any = cache.layers[step.index]
        if type(layer) is not GrowingLayer:
            layer = cache.layers[step.index] = GrowingLayer(layer)
        growing.append(layer)
        rooms.append(layer.make_room(states, count))
    yield rooms
    for layer in growing:
        layer.advance(count)


class _WholeDecoder:
    """How all layers of a decoder and its last norm run in one call. It steps aside where one of the layers would."""

    def __init__(self, base: nn.Module, steps: list[_Decoding], norm: Norm):
        self.base, self.steps = base, steps
        self.native = NativeLayers([step.native.layers[0] for step in steps], norm)
        self.config: Any = steps[0].config
        self.output: Any = None  # the class of what the decoder returns
        self.cache = cache_name(base) or "past_key_values"  # what its forward and its output call it
        self.children: list[dict] | None = None
        self.compared: list[dict] = []
        self.hooks: list[dict] = []
        self.alone: list[nn.Module] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copy looks at the modules of the copied decoder, which are not there yet when it is made."""
        return {**self.__dict__, "children": None, "compared": [], "hooks": [], "alone": []}

    def __call__(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> Any:
        """What the decoder's forward returns; None where these arguments are for its own forward.

        Those are served that want nothing but the last hidden state, of tokens that see those before them.
        """
        cache = others.pop(self.cache, None)
        if any(value is not None and value is not False for name, value in others.items() if name != "return_dict"):
            return None
        config, base = self.config, self.base
        wants_more = config.output_hidden_states or config.output_attentions or not config.return_dict
        if wants_more or others.get("return_dict") is False or getattr(config, "is_causal", None) is not None:
            return None
        if (input_ids is None) == (inputs_embeds is None) or torch.compiler.is_compiling() or base.training:
            return None
        if config._attn_implementation != "sdpa" or not self._untouched():
            return None
        x: Any = base.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # type: ignore[operator]
        if not _native_takes(x, self.native, base):
            return None
        batch, count, _ = x.shape
        if cache is None and (config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=config)
        lengths = {step._length(cache, x) for step in self.steps}
        length = lengths.pop()
        if lengths or length is None:
            return None
        first = None
        if attention_mask is not None:
            if type(attention_mask) is not Tensor or attention_mask.shape != (batch, length + count):
                return None
            real = attention_mask.bool()
            if not real.all():
                first = real.to(torch.uint8).argmax(-1)
                places = torch.arange(length + count)
                if not torch.equal(real, places >= first.unsqueeze(1)) or not real.any(-1).all():
                    return None
        if position_ids is None:
            position_ids = torch.arange(length, length + count).unsqueeze(0)
        elif position_ids.dim() != 2 or position_ids.shape[1] != count or len(position_ids) not in (1, batch):
            return None
        elif attention_mask is None and count > 1 and not (position_ids.diff() == 1).all():
            return None  # several texts in one sequence
        cos, sin = base.rotary_emb(x, position_ids=position_ids)  # type: ignore[operator]
        with _room_for(cache, self.steps, x) as rooms:
            y = self.native.step(x.contiguous(), (cos.contiguous(), sin.contiguous()), rooms, length, first)
        return self.output(last_hidden_state=y, **{self.cache: cache})

    def _untouched(self) -> bool:
        """Whether nobody hooked into the layers or the last norm, or changed what the layers hold."""
        if self.children is None:
            alone = [self.base.get_submodule("norm"), *(step.layer for step in self.steps)]
            below = [module for step in self.steps for module in step.layer.modules()]
            self.alone = alone
            self.hooks = [hooks for m in (*alone, *below) for hooks in (m._forward_hooks, m._forward_pre_hooks)]
            self.children = [module._modules for module in below if module._modules]
            self.compared = [dict(modules) for modules in self.children]
        if any(self.hooks) or any(module.training for module in self.alone) or self.children != self.compared:
            return False
        return all("decoding" in step.layer.__dict__ for step in self.steps)


class _Head:
    """A dense head whose product with a few rows is the library's: it takes as long as the weight is read."""

    def __init__(self, head: nn.Linear):
        self.head = head

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.head.weight
        few = 0 < x.numel() <= min(_HEAD_ROWS * x.shape[-1], _HEAD_NUMBERS)
        tracked = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        if not few or tracked or type(x) is not Tensor or x.dtype != weight.dtype or torch.compiler.is_compiling():
            return nn.Linear.forward(self.head, x)
        return nn.Linear.forward(self.head, x) if dense_unsupported(weight) else dense_linear(x, weight)


@torch.inference_mode()
def _fuse_head(model: PreTrainedModel) -> None:
    """Let a dense head multiply a few rows by the library, where it is a plain nn.Linear and both agree."""
    head: Any = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or "forward" in head.__dict__:
        return
    if dense_unsupported(head.weight):
        return
    step = _Head(head)
    x = torch.randn(1, head.in_features, generator=torch.Generator().manual_seed(0)).to(head.weight.dtype)
    if _close(step(x).float(), nn.Linear.forward(head, x).float(), _HEAD_TOLERANCE):
        head.decoding = step
        head.forward = MethodType(_forward_of_head, head)


def _forward_of_head(head: nn.Module, x: Tensor) -> Tensor:
    """Stands in the place of a head's forward."""
    return head.__dict__["decoding"](x)


def _layers_alone(base: nn.Module, layers: str) -> Norm:
    """The last norm of a decoder that has embeddings, layers, this norm, a rotary_emb, and nothing else.

    Raises:
        _Unfit: it has something else.
    """
    parts = {name for name, _ in base.named_children()}
    if parts != {"embed_tokens", layers, "norm", "rotary_emb"}:
        raise _Unfit(
            f"the decoder has {', '.join(sorted(parts))}, and a Llama's embed_tokens, layers, norm, rotary_emb"
        )
    if "forward" in base.__dict__:
        raise _Unfit("the decoder's forward was replaced")
    return _norm("norm", base.norm)  # type: ignore[arg-type]


@torch.inference_mode()
def _try_whole(base: nn.Module, whole: _WholeDecoder) -> None:
    """Run random rows through a decoder's own forward, whose layers run in one call each, and through the one call.

    In float32 nothing is rounded between two layers, so both agree to the last bits of the norm.

    Raises:
        _Unfit: they differ, or the decoder cannot be run by itself.
    """
    own: Any = type(base).forward
    embed: Any = base.get_submodule("embed_tokens")
    first = torch.tensor(_FIRST)
    count = sum(_PIECES)
    ids = torch.arange(len(first) * count).view(len(first), count) % embed.num_embeddings
    seen = torch.arange(count) >= first.unsqueeze(1)
    theirs, ours = DynamicCache(config=whole.config), DynamicCache(config=whole.config)
    try:
        x = embed(ids)
        texts: list[dict[str, Any]] = [{"input_ids": ids[:, :1]}, {"inputs_embeds": x[:, :1]}]
        by_ids, by_rows = (own(base, use_cache=False, **text).last_hidden_state for text in texts)
        if not torch.equal(by_ids, by_rows):
            raise _Unfit("the decoder does more with its embeddings than to look them up")
        start = 0
        for piece in _PIECES:
            end = start + piece
            arguments = {"inputs_embeds": x[:, start:end].float(), "attention_mask": seen[:, :end].long()}
            expected = own(base, **{whole.cache: theirs}, use_cache=True, **arguments)
            whole.output = type(expected)
            ours_too: dict[str, Any] = {whole.cache: ours, **arguments}
            got = whole(None, use_cache=True, **ours_too)
            if got is None:
                raise _Unfit("the decoder's arguments are not those of a Llama's")
            real = seen[:, start:end]
            if not _close(got.last_hidden_state[real], expected.last_hidden_state[real], _EXACT_TOLERANCE):
                raise _Unfit("the decoder computes something else than its layers and a norm")
            start = end
    except (TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        raise _Unfit(f"the decoder cannot be tried by itself: {error}") from error


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
