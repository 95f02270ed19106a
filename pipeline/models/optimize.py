"""A faster model: on the CPU, one call runs a whole decoder layer; on GPUs, projections are joined.

The model stays as transformers made it. On the CPU a layer gets another forward, which looks at its arguments. Tokens
that see those before them, with a key-value cache that grows or none, and nothing else wanted, go to NativeLayers
(csrc/layer.c): a prompt or a piece of it, and one token or several of a batch. Everything else goes to the layer's own
forward. A layer is changed only after both gave the same output and the same keys and values.

Where keys and values are rounded on their way to the cache, such a layer's cache holds their codes. Attention reads
these as they lie; others get the numbers that they stand for.

Where all layers of a decoder are changed, it gets another forward itself, by which all of them and the last norm are
one call; again after both gave the same output, and only for what the layers serve. `generate` then has the embedding
and the head in that call, too (next_token.py).
"""

import functools
import inspect
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from bitpress.eval.measure.cache import cache_name
from bitpress.kernels import products
from bitpress.kernels.caches.base import Codes
from bitpress.kernels.cpu.native import DTYPES, FLOAT32, dense_linear, dense_unsupported
from bitpress.kernels.decoder_layer import (
    ACTIVATIONS,
    Coding,
    Context,
    Experts,
    NativeLayer,
    NativeLayers,
    Norm,
    Parts,
    coding,
)
from bitpress.kernels.linear import QExperts, QLinear, inputs_left_alone, join_projections

from .fusing import FAILURES, Fusing, Trials, Unfit
from .kv_cache import CacheRounding, interceptions
from .next_token import NextToken, choose_tokens
from .structure import decoder

_ROOM = 256  # tokens that a cache grows by, at least; an eighth of what it holds where that is more
# Inputs that are to stay as they are, of 16 bits, or of 32 where oneDNN multiplies them: from so many rows on, a
# product with a dequantized weight is the faster one. A layer of SmolLM2 on Zen 4 takes 36 ms by it and 49 in one call
# for 512 rows of bfloat16, 8.2 and 5.7 for 64.
_LONG = 192
_STATES = ("keys", "values", "room", "_start", "_length", "_states")
# Up to so many rows, and numbers in them, a dense head's product is the library's. On two cores of Zen 4, with torch's:
# 1 row of SmolLM2 (49152 x 576) 1.7 and 3.7 ms, 4 rows 2.4 and 4.1; of 32000 x 2048 3.6 and 6.8, 4 rows 10.0 and 6.4.
_HEAD_ROWS, _HEAD_NUMBERS = 4, 4096
# Where oneDNN has no product of bfloat16, torch's takes 3 to 4 times as long. On two cores of Zen 3 (AVX2), with
# torch's: 8 rows of SmolLM2 10.7 and 32.3 ms, 32 rows 27.5 and 120; of 32000 x 2048 24 and 61, 32 rows 67 and 231.
_HEAD_ROWS_ALONE = 32
_PASSED = {"attention_mask", "position_ids", "cache", "past_key_values", "use_cache", "position_embeddings"}
_CAPTURING = "transformers.utils.output_capturing"  # whose hooks stay, but do nothing unless outputs are asked for

# What layers call their parts, each row one way. None: the part before has its outputs too, or there is no such part.
_ATTENTIONS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
    ("self_attn.qkv_proj", None, None, "self_attn.o_proj"),
    ("attn.c_attn", None, None, "attn.c_proj"),
)
_MLPS = (
    ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    ("mlp.gate_up_proj", None, "mlp.down_proj"),
    ("mlp.c_fc", None, "mlp.c_proj"),
    ("fc1", None, "fc2"),
)
_EXPERTS = ("mlp.gate", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")  # the router first
_SHARED = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj")
_SHARED_GATE = "mlp.shared_expert_gate"
_NORMS = (  # before attention, after it, before the MLP, after it
    ("input_layernorm", None, "post_attention_layernorm", None),
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    ("ln_1", None, "ln_2", None),
    ("self_attn_layer_norm", None, "final_layer_norm", None),
)
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_ACT = ("mlp.act_fn", "mlp.activation_fn", "mlp.act", "activation_fn", "mlp.experts.act_fn", "mlp.shared_expert.act_fn")
_DECODERS = (
    ("embed_tokens", None, "norm", "rotary_emb"),
    ("wte", "wpe", "ln_f", None),
)  # embeddings of positions second
_NOTHING = (nn.Dropout, nn.Identity)  # what these do when nothing is trained

# Relative to the layer's update, in float32: where a scheme rounds inputs to FP8, a code flips here and there, which
# changes a sum of products by the order of 1e-4; another formula changes it by more than this.
_TOLERANCE = 5e-3
_HEAD_TOLERANCE = 2.0**-7  # relative RMS: each logit is rounded to bfloat16, at most by 2^-9, in both
_EXACT_TOLERANCE = 1e-5  # of norms and activations, which are compared by themselves
# A layer is tried with two sequences, from place 40 on: 4 tokens at once, then one, then 2. The second sequence's first
# token is padding.
_PIECES, _POSITION, _FIRST = (4, 1, 2), 40, (0, 1)
_WINDOW = 3  # of layers that have one, for the trial
_CONVERTED = (
    1 << 22
)  # numbers of a parameter that is made float32 for the trial: no embeddings, whose rows are looked up


def optimize_for_decoding(model: PreTrainedModel, trials: Trials | None = None) -> None:
    """Speed up a model whose layers are all in place.

    On the CPU, decoder layers run in one call where they can. On GPUs, projections of one input become one product.
    """
    devices = {layer.device.type for layer in model.modules() if isinstance(layer, QLinear)}
    split = len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1
    if devices == {"cpu"} and not split:
        model.fusing = fuse(model, trials)  # type: ignore[assignment]
    else:
        join_projections(model)


def fuse(model: PreTrainedModel, trials: Trials | None = None) -> Fusing:
    """Let decoder layers run in one call, those that can; the others stay as they are. A dense head may change too."""
    trials = trials or Trials()
    _fuse_head(model, trials)
    path = decoder(model)
    layers = list(model.get_submodule(path).children())
    base = model.get_submodule(path.rpartition(".")[0])
    rotary = getattr(base, "rotary_emb", None)
    config = model.config.get_text_config(decoder=True)
    try:
        with _small_window(config):
            caches = DynamicCache(config=config), DynamicCache(config=config)  # for the trials of all layers
    except FAILURES as error:
        return Fusing(0, len(layers), {f"it has no key-value cache that is known: {error}": len(layers)})
    why: Counter[str] = Counter()
    masks = _Masks()
    steps: list[_Decoding] = []
    for number, layer in enumerate(layers):
        try:
            with _in_float32(layer):
                step = _Decoding(layer, _parts(layer), rotary, masks, caches[0])
                trials.run(f"layer {number}", functools.partial(_try_layer, step, *caches))
        except Unfit as reason:
            why[str(reason)] += 1
        else:
            steps.append(step)
            layer.decoding = step  # type: ignore[assignment]
            layer.forward = MethodType(_forward, layer)
    if why:
        return Fusing(len(layers) - why.total(), len(layers), dict(why))
    apart = around = None
    try:
        whole = WholeDecoder(base, steps, path.rpartition(".")[2])
        with _in_float32(base), _small_window(whole.config):
            trials.run("decoder", functools.partial(_try_whole, base, whole))
    except Unfit as reason:
        apart = str(reason)
    else:
        base.decoding = whole  # type: ignore[assignment]
        base.forward = MethodType(_forward_of_all, base)
        around = choose_tokens(model, whole, trials)
    return Fusing(len(layers), len(layers), {}, apart, around)


def unfuse(model: nn.Module) -> None:
    """Give every layer, the decoder and the head their own forward back."""
    for module in model.modules():
        if isinstance(module.__dict__.get("decoding"), _Decoding | WholeDecoder | _Head):
            del module.forward, module.decoding
        elif isinstance(module.__dict__.get("decoding"), NextToken):
            del module.generate, module.decoding


def _forward(layer: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Stands in the place of a decoder layer's forward."""
    step = layer.__dict__["decoding"]
    arguments = {**dict(zip(step.names, args)), **kwargs} if args else kwargs
    if step.serves(hidden_states, arguments):
        return step(hidden_states, arguments)
    return type(layer).forward(layer, hidden_states, *args, **kwargs)


def _forward_of_all(base: nn.Module, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    """Stands in the place of a decoder's forward."""
    if not args and (output := base.__dict__["decoding"](input_ids, **kwargs)) is not None:
        return output
    return type(base).forward(base, input_ids, *args, **kwargs)


class _Growing(DynamicLayer):
    """A layer's cache whose keys and values are views of larger tensors, until someone else replaces them.

    The views are made when somebody asks for them. Where `rounding` rounds what comes in, the tensors hold its codes.
    """

    def __init__(self, layer: DynamicLayer):
        self.room: tuple[Codes, Codes] | None = None  # see kernels/decoder_layer.py's Context
        self.rounding: CacheRounding | None = None  # by which the room is coded
        self._start = 0  # the number of the token that the room begins with
        self._length = 0  # tokens so far
        self._states: list[Any] | None = [None, None]  # keys and values; None: those in the room
        self.__dict__.update({name: value for name, value in layer.__dict__.items() if name not in _STATES})
        self.keys, self.values = layer.keys, layer.values

    def kept(self) -> int:
        """How many of the last tokens the cache has to hold."""
        return self._length

    def _both(self) -> list[Any]:
        if self._states is None:
            assert self.room is not None
            kept = self.kept()
            begin = self._length - kept - self._start
            self._states = [
                _decoded(_narrowed(codes, begin, kept), self.rounding, place, self.dtype)
                for place, codes in enumerate(self.room)
            ]
        return self._states

    def _replace(self, place: int, states: Tensor | None) -> None:
        both = list(self._both())
        both[place] = states
        self._states, self.room = both, None

    keys = property(lambda self: self._both()[0], lambda self, states: self._replace(0, states))
    values = property(lambda self: self._both()[1], lambda self, states: self._replace(1, states))

    def get_seq_length(self) -> int:
        """Tokens so far; nothing is decoded to count them."""
        return super().get_seq_length() if self.room is None else self._length

    def make_room(self, like: Tensor, count: int, rounding: CacheRounding | None) -> tuple[Codes, Codes, int]:
        """Keys and values that have room for `count` more tokens, and the number of the token that they begin with.

        Args:
            like: [batch, heads, 0, dim], what an empty cache is to hold.
            rounding: what rounds the layer's keys and values; None: nothing.
        """
        if self.room is None:
            keys, values = self._both()
            if not self.is_initialized or keys is None or keys.numel() == 0:
                self.lazy_initialization(like, like)
                keys = values = like
            self._length = self.get_seq_length() if keys.shape[2] else 0
            self._start = self._length - keys.shape[2]
            self.rounding = rounding
            self.room = (_coded(keys, rounding, 0), _coded(values, rounding, 1))
        if self.room[0]["codes"].shape[2] < self._length - self._start + count:
            begin, more = self._length - self.kept() - self._start, count + max(_ROOM, self.kept() // 8)
            self.room = (
                _with_room(self.room[0], begin, self.kept(), more),
                _with_room(self.room[1], begin, self.kept(), more),
            )
            self._start += begin
        self._states = None
        return *self.room, self._start

    def advance(self, count: int) -> None:
        """So many tokens after the last are in the room now."""
        assert self.room is not None
        self._length += count
        self._states = None


class GrowingLayer(_Growing):
    """The cache of a layer whose tokens see all before them."""


class GrowingWindowLayer(_Growing, DynamicSlidingWindowLayer):
    """The cache of a layer whose tokens see a window of those before them; what is beyond it goes when room is made."""

    def kept(self) -> int:
        return min(self._length, self.sliding_window - 1)

    def advance(self, count: int) -> None:
        super().advance(count)
        self.cumulative_length = self._length


_GROWING: dict[type, type[_Growing]] = {DynamicLayer: GrowingLayer, DynamicSlidingWindowLayer: GrowingWindowLayer}


def filled(
    layer: Any,
    window: int | None,
    rounding: CacheRounding | None,
    batch: int,
    heads: int,
    dim: int,
    dtype: torch.dtype,
) -> int | None:
    """How many tokens a layer's cache has taken in; None where it is of another kind, shape or dtype.

    Args:
        window: how many tokens the layer's tokens see; None: all.
        rounding: what rounds the layer's keys and values; None: nothing.
    """
    if type(layer) not in _GROWING and not isinstance(layer, _Growing):
        return None
    slides = isinstance(layer, DynamicSlidingWindowLayer)
    if slides and (layer.sliding_window != window or layer.record_past):
        return None
    if isinstance(layer, _Growing) and layer.room is not None:
        states, length = (layer.room[0]["codes"], layer.room[1]["codes"]), layer._length
        if layer.rounding is not rounding:
            return None
        if rounding is not None:
            return length if layer.dtype == dtype and states[0].shape[:2] == (batch, heads) else None
    elif not layer.is_initialized or layer.keys is None or layer.keys.numel() == 0:
        return None if slides and layer.cumulative_length else 0
    else:
        states, length = (layer.keys, layer.values), layer.get_seq_length()
        if slides and layer.keys.shape[2] != min(length, layer.sliding_window - 1):
            return None
    if states[0].dim() != 4 or not states[0].dtype == states[1].dtype == dtype:
        return None
    shape = states[0].shape
    return length if (shape[0], shape[1], shape[3]) == (batch, heads, dim) else None


def _coded(states: Tensor, rounding: CacheRounding | None, place: int) -> Codes:
    """Keys (place 0) or values (1) [batch, heads, tokens, dim], as Context has them."""
    if rounding is None:
        return {"codes": states}
    codes, scale = rounding.encode(states, place), rounding.scale(place)
    if scale is None:
        return codes
    scales = scale.to(torch.float32).flatten().expand(states.shape[:2]).clone()
    scales[states.isnan().flatten(2).any(-1)] = torch.nan
    return {**codes, "scales": scales}


def _decoded(codes: Codes, rounding: CacheRounding | None, place: int, dtype: torch.dtype) -> Tensor:
    """Keys or values [batch, heads, tokens, dim] that `_coded` made such codes of."""
    if rounding is None:
        return codes["codes"]
    states = rounding.decode(codes, place)
    if rounding.scale(place) is not None:
        states.masked_fill_(codes["scales"].isnan()[:, :, None, None], torch.nan)
    return states.to(dtype)


def _narrowed(codes: Codes, begin: int, count: int) -> Codes:
    """The tokens from place `begin` on; what all tokens share stays."""
    return {name: each.narrow(2, begin, count) if each.dim() == 4 else each for name, each in codes.items()}


def _with_room(codes: Codes, begin: int, count: int, more: int) -> Codes:
    """A copy of `count` tokens from place `begin` on, with room for `more`."""
    copied = {}
    for name, each in _narrowed(codes, begin, count).items():
        if each.dim() == 4:
            with torch.inference_mode(False):  # what is made in that mode could not be continued outside of it
                larger = torch.empty((*each.shape[:2], count + more, each.shape[3]), dtype=each.dtype)
            larger[:, :, :count] = each
            each = larger
        copied[name] = each
    return copied


class _Masks:
    """Reads attention masks, each once for all layers of a forward."""

    def __init__(self) -> None:
        self.last: dict[int | None, tuple[weakref.ref[Tensor], int, Tensor | None]] = {}  # by window

    def first(self, mask: Tensor, batch: int, count: int, length: int, window: int | None) -> Tensor | None:
        """int64 [batch], the first token of each sequence that is seen.

        None where the mask is not that of tokens that see those before them, or so many as the window has, from a first
        token on, and themselves.

        Args:
            mask: of the last `count` tokens, `length` come before; bool [batch, 1, count, places], or numbers that are
                added, 0 or the smallest of the dtype. The places are those of the last tokens.
        """
        if mask.is_inference():  # changes of such a one are not counted
            return self._read(mask, batch, count, length, window)
        last = self.last.get(window)
        if last is None or last[0]() is not mask or last[1] != mask._version:
            read = self._read(mask, batch, count, length, window)
            last = self.last[window] = (weakref.ref(mask), mask._version, read)
        return last[2]

    @staticmethod
    def _read(mask: Tensor, batch: int, count: int, length: int, window: int | None) -> Tensor | None:
        if mask.dim() != 4 or mask.shape[:3] != (batch, 1, count) or not count <= mask.shape[3] <= length + count:
            return None
        if mask.is_floating_point():
            lowest = torch.finfo(mask.dtype).min
            if not ((mask == 0) | (mask == lowest)).all():
                return None
            mask = mask == 0
        elif mask.dtype != torch.bool:
            return None
        tokens = torch.arange(length + count - mask.shape[3], length + count)
        first = tokens[mask[:, 0].any(1).to(torch.uint8).argmax(-1)]
        own = tokens[-count:].unsqueeze(1)
        seen = (tokens >= first.view(-1, 1, 1)) & (tokens <= own)
        if window is not None:
            seen &= tokens > own - window
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
    inputs, slow = native.inputs(), x.dtype == torch.float32 and not products.faster(x.dtype)
    return None not in inputs and not (FLOAT32 in inputs and not slow and x.shape[0] * x.shape[1] >= _LONG)


class _Decoding:
    """How a layer runs in one call. It steps aside when the modules below it are not those that were compared.

    Args:
        cache: such as the model makes; tells whether the layer has a window.
    Raises:
        Unfit: the library cannot run these parts.
    """

    def __init__(self, layer: nn.Module, parts: Parts, rotary: nn.Module | None, masks: _Masks, cache: DynamicCache):
        if reason := parts.unsupported():
            raise Unfit(reason)
        if any("forward" in module.__dict__ for module in layer.modules()):
            raise Unfit("its forward was replaced")
        changes = interceptions(layer)
        self.interceptions = list(changes)  # hooks that the one call does the work of
        self.rounding: CacheRounding | None = None  # what rounds keys and values on their way to the cache
        self.coding: Coding | None = None  # how the cache holds them then
        for change in changes.values():
            if not isinstance(change, CacheRounding) or self.rounding is not None:
                raise Unfit("its keys and values are changed on their way to the cache")
            scales = [scale for place in (0, 1) if (scale := change.scale(place)) is not None]
            if any(scale.numel() not in (1, parts.key_heads) for scale in scales):
                raise Unfit(f"its cache has no scale for each of {parts.key_heads} heads")
            if isinstance(how := coding(change.cache, parts.dim), str):
                raise Unfit(how)
            self.rounding, self.coding = change, how
        self.layer, self.parts, self.masks = layer, parts, masks
        self.native = NativeLayers([NativeLayer(parts)])
        attention = _attention_of(layer)
        self.index, self.config = int(attention.layer_idx), attention.config
        self.implementation = "sdpa" if parts.cap is None else "eager"  # only this one knows caps
        self.names = list(inspect.signature(type(layer).forward).parameters)[2:]  # after self and the layer's input
        self.rotary = rotary if "position_embeddings" in self.names else None
        kinds = self.rotary is not None and "layer_type" in inspect.signature(self.rotary.forward).parameters
        self.kind = self.config.layer_types[self.index] if kinds else None  # of several tables of the rotation
        if self.index >= len(cache.layers):
            raise Unfit("its cache is not one of its own")
        self.slides = isinstance(cache.layers[self.index], DynamicSlidingWindowLayer)
        self.children: list[tuple[dict, dict]] | None = None
        self.hooks: list[dict] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copy looks at the modules of the copied layer, which are not there yet when it is made."""
        return {**self.__dict__, "children": None, "hooks": []}

    @property
    def window(self) -> int | None:
        """How many tokens a token sees, itself the last; None: all before it."""
        return self.config.sliding_window if self.slides else None

    def rotation(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """cos and sin for tokens at these positions [batch or 1, count]; None where the layer rotates nothing."""
        if self.rotary is None:
            return None
        return self.rotary(x, positions) if self.kind is None else self.rotary(x, positions, self.kind)

    def serves(self, x: Tensor, arguments: dict[str, Any]) -> bool:
        """Whether these are tokens that see those before them, and nothing but the next hidden state is wanted.

        Args:
            x: the layer's input. arguments: those of the layer's forward by name.
        """
        if torch.compiler.is_compiling() or self.layer.training or not _native_takes(x, self.native, self.layer):
            return False
        if arguments.get("is_causal") is not None or any(arguments[name] for name in arguments.keys() - _PASSED):
            return False
        batch, count, _ = x.shape
        rotation = arguments.get("position_embeddings")
        if (rotation is None) != (self.rotary is None):
            return False
        if rotation is not None:
            if not isinstance(rotation, tuple) or len(rotation) != 2:
                return False
            features = rotation[0].shape[-1]
            shapes = {tuple(table.shape) for table in rotation}
            if shapes not in ({(1, count, features)}, {(batch, count, features)}) or features > self.parts.dim:
                return False
            if any(table.dtype != x.dtype for table in rotation):
                return False
        if (length := self.length(_cache_in(arguments), x)) is None:
            return False
        mask = arguments.get("attention_mask")
        if (mask is None and count > 1 and length) or self.config._attn_implementation != self.implementation:
            return False
        if mask is None and self.implementation == "eager" and count > 1:
            return False
        if mask is not None and self.masks.first(mask, batch, count, length, self.window) is None:
            return False
        return not _captures() and self.untouched()

    def length(self, cache: Any, x: Tensor) -> int | None:
        """How many tokens the cache of this layer holds; None where it is another kind of cache, or another's."""
        if cache is None:
            return 0
        if type(cache) is not DynamicCache or cache.offloading or len(cache.layers) <= self.index:
            return None
        parts = self.parts
        layer = cache.layers[self.index]
        return filled(layer, self.window, self.rounding, len(x), parts.key_heads, parts.dim, x.dtype)

    def growing(self, cache: Any) -> _Growing:
        """The layer's own cache, of which `length` is known."""
        layer = cache.layers[self.index]
        if not isinstance(layer, _Growing):
            layer = cache.layers[self.index] = _GROWING[type(layer)](layer)
        return layer

    def untouched(self) -> bool:
        """Whether the modules below the layer are those that were compared, and nobody else hooked into them."""
        if self.children is None:
            modules = list(self.layer.modules())
            self.children = [(module._modules, dict(module._modules)) for module in modules if module._modules]
            self.hooks = [hooks for m in modules[1:] for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        if any(now != then for now, then in self.children):
            return False
        hooks = [hook for hooks in self.hooks if hooks for hook in hooks.values() if hook.__module__ != _CAPTURING]
        return hooks == self.interceptions

    def __call__(self, x: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The layer's output, where `serves` these; their keys and values are in the cache then."""
        cache, mask, rotation = _cache_in(arguments), arguments.get("attention_mask"), None
        batch, count, _ = x.shape
        length = self.length(cache, x)
        assert length is not None
        first = None if mask is None else self.masks.first(mask, batch, count, length, self.window)
        if (tables := arguments.get("position_embeddings")) is not None:
            rotation = (tables[0].contiguous(), tables[1].contiguous())
        with _room_for(cache, [self], x) as rooms:
            keys, values, start = rooms[0]
            context = Context(keys, values, rotation, start, self.window, self.coding)
            return self.native.step(x.contiguous(), [context], length, first)


def _captures() -> bool:
    """Whether transformers records, during this forward, what modules below a layer put out."""
    collector = getattr(sys.modules.get(_CAPTURING), "_active_collector", None)
    recorded: dict[str, Any] = (None if collector is None else collector.get()) or {}
    return any(not name.startswith(("hidden_states", "_hidden_states")) for name in recorded)


@contextmanager
def _room_for(cache: Any, steps: "list[_Decoding]", x: Tensor) -> Iterator[list[tuple[Codes, Codes, int]]]:
    """Keys and values of these layers with room for x [batch, count, hidden], and the number of the token that they
    begin with; at the end they are the cache's.

    Each layer has its own, without a cache too: the first tokens are through all layers before the next ones begin.
    """
    count = x.shape[1]
    rooms: list[tuple[Codes, Codes, int]] = []
    growing: list[_Growing] = []
    for step in steps:
        states = torch.empty((len(x), step.parts.key_heads, 0, step.parts.dim), dtype=x.dtype)
        if cache is None:
            keys, values = (_with_room(_coded(states, step.rounding, place), 0, 0, count) for place in (0, 1))
            rooms.append((keys, values, 0))
            continue
        growing.append(step.growing(cache))
        rooms.append(growing[-1].make_room(states, count, step.rounding))
    yield rooms
    for layer in growing:
        layer.advance(count)


class WholeDecoder:
    """How all layers of a decoder and its last norm run in one call. It steps aside where one of the layers would."""

    def __init__(self, base: nn.Module, steps: list[_Decoding], layers: str):
        self.base, self.steps = base, steps
        self.embed, self.positions, self.norm, norm = _around(base, layers)
        self.native = NativeLayers([step.native.layers[0] for step in steps], norm)
        self.config: Any = steps[0].config
        self.output = _output(base, layers)
        self.cache = cache_name(base) or "past_key_values"  # what its forward and its output call it
        self.children: list[dict] | None = None
        self.compared: list[dict] = []
        self.hooks: list[dict] = []
        self.alone: list[nn.Module] = []
        self.interceptions = [hook for step in steps for hook in step.interceptions]

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
        wants_more = wants_more or getattr(config, "output_router_logits", False)
        if wants_more or others.get("return_dict") is False or getattr(config, "is_causal", None) is not None:
            return None
        if (input_ids is None) == (inputs_embeds is None) or torch.compiler.is_compiling() or base.training:
            return None
        if config._attn_implementation != self.steps[0].implementation or not self.untouched():
            return None
        x: Any = base.get_submodule(self.embed)(input_ids) if inputs_embeds is None else inputs_embeds
        if not _native_takes(x, self.native, base):
            return None
        batch, count, _ = x.shape
        if cache is None and (config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=config)
        lengths = {step.length(cache, x) for step in self.steps}
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
        if self.positions is not None:
            x = x + base.get_submodule(self.positions)(position_ids)
        rotations: dict[str | None, tuple[Tensor, Tensor] | None] = {}
        for step in self.steps:
            if step.kind not in rotations:
                tables = step.rotation(x, position_ids)
                rotations[step.kind] = tables and (tables[0].contiguous(), tables[1].contiguous())
        with _room_for(cache, self.steps, x) as rooms:
            contexts = [
                Context(keys, values, rotations[step.kind], start, step.window, step.coding)
                for step, (keys, values, start) in zip(self.steps, rooms)
            ]
            y = self.native.step(x.contiguous(), contexts, length, first)
        return self.output(last_hidden_state=y, **{self.cache: cache})

    def untouched(self) -> bool:
        """Whether nobody hooked into the layers or the last norm, or changed what the layers hold."""
        if self.children is None:
            alone = [self.base.get_submodule(self.norm), *(step.layer for step in self.steps)]
            below = [module for step in self.steps for module in step.layer.modules()]
            self.alone = alone
            self.hooks = [hooks for m in (*alone, *below) for hooks in (m._forward_hooks, m._forward_pre_hooks)]
            self.children = [module._modules for module in below if module._modules]
            self.compared = [dict(modules) for modules in self.children]
        hooks = [hook for hooks in self.hooks if hooks for hook in hooks.values()]
        if (
            hooks != self.interceptions
            or any(module.training for module in self.alone)
            or self.children != self.compared
        ):
            return False
        return all("decoding" in step.layer.__dict__ for step in self.steps)


class _Head:
    """A dense head whose product with a few rows is the library's: it takes as long as the weight is read."""

    def __init__(self, head: nn.Linear):
        self.head = head

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.head.weight
        most = min(_HEAD_ROWS * x.shape[-1], _HEAD_NUMBERS)
        if x.dtype == torch.bfloat16 and products.faster(x.dtype):
            most = _HEAD_ROWS_ALONE * x.shape[-1]
        few = 0 < x.numel() <= most
        tracked = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        plain = type(x) is Tensor and x.dtype == weight.dtype and not torch.compiler.is_compiling()
        if few and plain and not tracked and not dense_unsupported(weight):
            return dense_linear(x, weight)
        # The last tokens of several sequences lie apart. For such rows torch 2.13 copies the weight once for each
        # sequence: 341 ms in place of 2.5 for 8 of them and [49152, 576] in bfloat16.
        return nn.Linear.forward(self.head, x.contiguous())


@torch.inference_mode()
def _fuse_head(model: PreTrainedModel, trials: Trials) -> None:
    """Let a dense head multiply a few rows by the library, where it is a plain nn.Linear and both agree."""
    head: Any = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or "forward" in head.__dict__:
        return
    if dense_unsupported(head.weight):
        return
    step = _Head(head)

    def trial() -> None:
        x = torch.randn(1, head.in_features, generator=torch.Generator().manual_seed(0)).to(head.weight.dtype)
        if not _close(step(x).float(), nn.Linear.forward(head, x).float(), _HEAD_TOLERANCE):
            raise Unfit("the library's product differs")

    with suppress(Unfit):
        trials.run("head", trial)
        head.decoding = step
        head.forward = MethodType(_forward_of_head, head)


def _forward_of_head(head: nn.Module, x: Tensor) -> Tensor:
    """Stands in the place of a head's forward."""
    return head.__dict__["decoding"](x)


def _around(base: nn.Module, layers: str) -> tuple[str, str | None, str, Norm]:
    """What is around a decoder's layers: its embeddings, those of positions, its last norm, and what that computes.

    Raises:
        Unfit: there is something else.
    """
    parts = {name for name, module in base.named_children() if not isinstance(module, _NOTHING)}
    for embed, positions, norm, rotary in _DECODERS:
        if parts == {embed, positions, layers, norm, rotary} - {None}:
            break
    else:
        expected = ", ".join(name for name in (_DECODERS[0][0], layers, *_DECODERS[0][2:]) if name)
        raise Unfit(f"the decoder has {', '.join(sorted(parts))}, and a Llama's {expected}")
    if "forward" in base.__dict__:
        raise Unfit("the decoder's forward was replaced")
    with _in_float32(base.get_submodule(norm)):
        return embed, positions, norm, _norm(norm, base.get_submodule(norm))


@torch.inference_mode()
def _output(base: nn.Module, layers: str) -> Any:
    """The class of what a decoder returns. It is run without its layers, as to read them all takes long.

    Raises:
        Unfit: it cannot be run so.
    """
    own: Any = type(base).forward
    kept = base._modules[layers]
    base._modules[layers] = nn.ModuleList()
    try:
        return type(own(base, torch.zeros(1, 1, dtype=torch.int64), use_cache=False))
    except (*FAILURES, RuntimeError) as error:
        raise Unfit(f"the decoder cannot be run without its layers: {error}") from error
    finally:
        base._modules[layers] = kept


@torch.inference_mode()
def _try_whole(base: nn.Module, whole: WholeDecoder) -> None:
    """Run random rows through a decoder's own forward, whose layers run in one call each, and through the one call.

    In float32 nothing is rounded between two layers, so both agree to the last bits of the norm.

    Raises:
        Unfit: they differ, or the decoder cannot be run by itself.
    """
    own: Any = type(base).forward
    embed: Any = base.get_submodule(whole.embed)
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
            raise Unfit("the decoder does more with its embeddings than to look them up")
        start = 0
        for piece in _PIECES:
            end = start + piece
            arguments = {"inputs_embeds": x[:, start:end].float(), "attention_mask": seen[:, :end].long()}
            expected = own(base, **{whole.cache: theirs}, use_cache=True, **arguments)
            ours_too: dict[str, Any] = {whole.cache: ours, **arguments}
            got = whole(None, use_cache=True, **ours_too)
            if got is None:
                raise Unfit("the decoder's arguments are not those of a Llama's")
            real = seen[:, start:end]
            if not _close(got.last_hidden_state[real], expected.last_hidden_state[real], _EXACT_TOLERANCE):
                raise Unfit("the decoder computes something else than its layers and a norm")
            start = end
    except FAILURES as error:
        raise Unfit(f"the decoder cannot be tried by itself: {error}") from error


def _cache_in(arguments: dict[str, Any]) -> Any:
    """The cache among a layer's arguments: `cache` from transformers 5.24 on, `past_key_values` before."""
    return arguments["cache"] if "cache" in arguments else arguments.get("past_key_values")


def _attention_of(layer: nn.Module) -> Any:
    """The part of a layer that attention is done by: that which the first of its linear layers belongs to.

    Raises:
        Unfit: it has none.
    """
    names = _names(dict(layer.named_modules()), _ATTENTIONS)
    return layer.get_submodule(str(names[0]).rpartition(".")[0])


def _names(modules: dict[str, nn.Module], rows: tuple[tuple[str | None, ...], ...]) -> tuple[str | None, ...]:
    """The first row all of whose names are modules.

    Raises:
        Unfit: there is none; says what is missing of the row that most of is there.
    """
    missing = [[name for name in row if name and name not in modules] for row in rows]
    shares = [len(absent) / sum(name is not None for name in row) for absent, row in zip(missing, rows)]
    best = shares.index(min(shares))
    if missing[best]:
        raise Unfit(f"it has no {missing[best][0]}")
    return rows[best]


def _parts(layer: nn.Module) -> Parts:
    """The parts of a layer, by its modules' names and by what they compute.

    Raises:
        Unfit: a part is missing, or the layer has another one.
    """
    modules = dict(layer.named_modules())
    attention = _attention_of(layer)
    names = _names(modules, _ATTENTIONS)
    routed = _EXPERTS[1] in modules
    mlp: tuple[str | None, ...] = (None, None, None) if routed else _names(modules, _MLPS)
    if routed and _SHARED[0] in modules:
        mlp = _names(modules, (_SHARED,))
    around = _names(modules, tuple(sorted(_NORMS, key=lambda row: -sum(name in modules for name in row))))
    heads = tuple(name if name in modules else None for name in _HEAD_NORMS)
    act = next((name for name in _ACT if name in modules), None)
    used = {name for name in (*names, *mlp, *around, *heads, *_ACT) if name is not None}
    if routed:
        used |= {*_EXPERTS, _SHARED_GATE}
    for name, module in modules.items():
        holds = not name or any(each.startswith(f"{name}.") for each in used)
        if not holds and not isinstance(module, _NOTHING) and not f"{name}.".startswith(tuple(f"{u}." for u in used)):
            raise Unfit(f"it has a {name}, which no layer that can be fused has")
    for name in (*names, *mlp):
        if name and not isinstance(modules[name], QLinear):
            raise Unfit(f"{name} is not quantized")
    dim, scale = getattr(attention, "head_dim", None), getattr(attention, "scaling", None)
    says = isinstance(getattr(attention, "layer_idx", None), int) and hasattr(attention, "config")
    if not isinstance(dim, int) or not isinstance(scale, float) or not says:
        raise Unfit("attention does not say its head_dim, scaling, layer_idx and config")
    cap = getattr(attention, "attn_logit_softcapping", None)
    kind = attention.config._attn_implementation
    if kind != ("sdpa" if cap is None else "eager"):
        raise Unfit(f"attention is {kind}, not {'sdpa' if cap is None else 'eager'}")
    linears: Any = tuple(None if name is None else modules[name] for name in (*names, *mlp))
    norms = tuple(None if name is None else _norm(name, modules[name]) for name in (*around, *heads))
    outputs, mixed = linears[0].out_features, linears[3].in_features
    keys = linears[1].out_features if linears[1] is not None else (outputs - mixed) // 2
    experts = _experts(modules) if routed else None
    return Parts(linears, norms, mixed // dim, keys // dim, dim, scale, _activation(act, modules), cap, experts)


def _experts(modules: dict[str, nn.Module]) -> Experts:
    """The experts of a layer, and how its router sends tokens to them.

    Raises:
        Unfit: it does so in another way.
    """
    router, gates, downs = (modules.get(name) for name in _EXPERTS)
    weight = getattr(router, "weight", None)
    if router is None or not isinstance(weight, Tensor) or downs is None:
        raise Unfit(f"its experts have no {' or '.join(_EXPERTS[:1] + _EXPERTS[2:])}")
    if not isinstance(gates, QExperts) or not isinstance(downs, QExperts) or gates.interleaved:
        raise Unfit("its experts are not quantized, or gates and ups alternate")
    linears: Any = []
    each_gate: Any
    for each_gate, down in zip(gates.experts, downs.experts):
        expert: list[Any] = [*each_gate, *([None] if len(each_gate) == 1 else []), *down.children()]
        if len(expert) != 3 or not all(each is None or isinstance(each, QLinear) for each in expert):
            raise Unfit("some experts are not quantized")
        linears.append(tuple(expert))
    hidden = weight.shape[1]
    x = torch.randn(16, hidden, generator=torch.Generator().manual_seed(0))
    outputs: Any = router(x)
    if not isinstance(outputs, tuple) or len(outputs) != 3:
        raise Unfit("its router does not say which experts it chose")
    _, shares, chosen = outputs
    probabilities = (x @ weight.float().t()).softmax(-1)
    top, expected = probabilities.topk(shares.shape[-1], dim=-1)
    renormalized = not _close(shares, top, _EXACT_TOLERANCE)
    if renormalized:
        top = top / top.sum(-1, keepdim=True)
    if not torch.equal(chosen, expected) or not _close(shares, top, _EXACT_TOLERANCE):
        raise Unfit("its router computes something else than the softmax of a product")
    shared = modules.get(_SHARED_GATE)
    gate = None if shared is None else getattr(shared, "weight", None)
    if shared is not None:
        gate = (gate.float() if isinstance(gate, Tensor) else shared(torch.eye(hidden))).flatten().clone()
    return Experts(weight.detach().float().clone(), shares.shape[-1], renormalized, tuple(linears), gate)


def _norm(name: str, module: nn.Module) -> Norm:
    """The weight, bias and epsilon of an RMS norm or a LayerNorm. What counts is the output: some store weights less 1.

    Raises:
        Unfit: it computes something else.
    """
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        raise Unfit(f"{name} is not a norm with a weight")
    count = weight.numel()
    signs = torch.ones(count)
    signs[::2] = -1  # of mean 0 and mean square 1, for the even counts that layers have
    bias = module(torch.zeros(count)).to(torch.float32)
    scales = (module(signs).to(torch.float32) - bias) * signs * (1 + eps) ** 0.5
    x = (torch.randn(count, generator=torch.Generator().manual_seed(0)) + 0.5) * eps**0.5  # so small that eps counts
    for centered in (False, True):
        y = x - x.mean() if centered else x
        norm = Norm(scales, eps, bias if bias.any() else None, centered)
        if _close(module(x), y * torch.rsqrt(y.square().mean() + eps) * scales + bias, _EXACT_TOLERANCE):
            return norm
    raise Unfit(f"{name} is neither an RMS norm nor a LayerNorm")


def _activation(name: str | None, modules: dict[str, nn.Module]) -> str:
    """The name of an activation function, by what it computes.

    Raises:
        Unfit: NativeLayer has no such function.
    """
    if name is None:
        raise Unfit(f"it has no {_ACT[0]}")
    x = torch.linspace(-8, 8, 1001)
    functions = (F.silu(x), F.gelu(x, approximate="tanh"), F.gelu(x), F.relu(x))
    for activation, expected in zip(ACTIVATIONS, functions):
        if _close(modules[name](x), expected, _EXACT_TOLERANCE):
            return activation
    raise Unfit(f"{name} is {type(modules[name]).__name__}")


@contextmanager
def _in_float32(module: nn.Module) -> Iterator[None]:
    """Meanwhile, parameters that are not quantized are float32, so that a trial rounds nothing."""
    own = [(parameter, parameter.data) for parameter in module.parameters()]
    try:
        for parameter, data in own:
            if data.is_floating_point() and data.numel() <= _CONVERTED:
                parameter.data = data.float()
        yield
    finally:
        for parameter, data in own:
            parameter.data = data


@contextmanager
def _small_window(config: Any) -> Iterator[None]:
    """Meanwhile, layers with a window have one that a trial's tokens reach beyond."""
    window = getattr(config, "sliding_window", None)
    try:
        if window is not None:
            config.sliding_window = _WINDOW
        yield
    finally:
        if window is not None:
            config.sliding_window = window


def _close(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether two tensors differ by less than `tolerance`, relative to the norm; NaN is close to nothing."""
    return bool((got - expected).norm() <= tolerance * expected.norm())


def _try_layer(step: _Decoding, theirs: Any, ours: Any) -> None:
    """As _try; and with scores so large that their cap counts, where they have one."""
    _try(step, theirs, ours)
    if step.parts.cap is not None:
        _try_cap(step, theirs)


@torch.inference_mode()
def _try(step: _Decoding, theirs: Any, ours: Any) -> None:
    """Run random rows through a layer's own forward and through the native one.

    No kernel rounds inputs to integers here: a code that flips would hide what is to be seen. And where a scheme's
    range is made for massive activations, nearly all codes of random inputs are 0: too little comes out to compare.

    Args:
        theirs, ours: caches in which nothing of this layer is yet.
    Raises:
        Unfit: they differ, or the layer cannot be run by itself.
    """
    layer, config = step.layer, step.config
    if step.rotary is None and "position_embeddings" in step.names:
        raise Unfit("the model has no rotary_emb")
    count, first = sum(_PIECES), torch.tensor(_FIRST)
    x = torch.randn(len(first), count, step.native.hidden, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(_POSITION, _POSITION + count).unsqueeze(0)
    places = torch.arange(count)
    name = cache_name(layer) or "past_key_values"
    with _small_window(config), inputs_left_alone(layer, of_all_schemes=True):
        seen = (places <= places.unsqueeze(1)) & (places >= first.view(-1, 1, 1, 1))
        if step.window is not None:
            seen &= places > places.unsqueeze(1) - step.window
        try:
            tables = step.rotation(x, positions)
            start = 0
            for piece in _PIECES:
                end = start + piece
                mask = seen[:, :, start:end, :end]
                if step.window is not None:
                    mask = mask[..., max(0, start - step.window + 1) :]  # what the cache no longer has
                if step.implementation == "eager":
                    mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
                arguments: dict[str, Any] = {"attention_mask": mask}
                if tables is not None:
                    arguments["position_embeddings"] = (tables[0][:, start:end], tables[1][:, start:end])
                rows = x[:, start:end]
                expected = type(layer).forward(
                    layer, rows, position_ids=positions[:, start:end], use_cache=True, **{name: theirs}, **arguments
                )
                if not step.serves(rows, {name: ours, **arguments}):
                    raise Unfit(f"its cache is a {type(ours.layers[step.index]).__name__}")
                got = step(rows, {name: ours, **arguments})
                real = places[start:end] >= first.unsqueeze(1)
                _compare((got - rows)[real], (expected - rows)[real])
                start = end
        except FAILURES as error:
            raise Unfit(f"it cannot be tried by itself: {error}") from error
    for states in ("keys", "values"):
        own, right = (getattr(cache.layers[step.index], states) for cache in (ours, theirs))
        real = (places[-own.shape[2] :] >= first.unsqueeze(1)).unsqueeze(1).expand(own.shape[:3])
        _compare(own[real], right[real])


def _try_cap(step: _Decoding, tried: Any) -> None:
    """Try the layer again, its scores so large that the cap changes them.

    Args:
        tried: the cache that its own forward left.
    Raises:
        Unfit: outputs differ.
    """
    attention, parts = _attention_of(step.layer), step.parts
    keys = tried.layers[step.index].keys
    assert parts.cap is not None
    # what scores are about, where queries are as large as keys
    size = keys.square().sum(-1).mean().item() / parts.dim**0.5
    scale = parts.cap / 4 / size
    try:
        attention.scaling = scale
        with _small_window(step.config):
            caches = DynamicCache(config=step.config), DynamicCache(config=step.config)
        other = _Decoding(step.layer, replace(parts, scale=scale), step.rotary, step.masks, caches[0])
        _try(other, *caches)
    finally:
        attention.scaling = parts.scale


def _compare(got: Tensor, expected: Tensor) -> None:
    if not _close(got, expected, _TOLERANCE):
        raise Unfit("it computes something else than its parts say")
