"""A model whose attention reads keys and values as a quantized cache gives them back.

Every attention of transformers hands its keys and values to a cache, in one call of `update`, and computes with what
that returns. Here something stands between the two and rounds what is handed over, so it does not matter how attention
is computed, nor what kind of cache there is. Without one, as when a text is scored, attention gets a cache for the one
call. So every key and value is read through the rounding, in a prompt, too: servers read a prompt's from the cache.

Here what is saved is precision: the tensors in memory are as large as ever. Decoder layers that run in one call
(optimize.py) keep the codes and save memory, too.
"""

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedModel

from bitpress.kernels.caches.base import CacheType, Codes
from bitpress.kernels.kv_cache import bytes_per_token, rounded

from ..errors import CheckpointError, listing
from ..storage.checkpoint import Checkpoint
from .cache_scales import read_scale
from .structure import ParameterPath, decoder

SCALES = ("k_scale", "v_scale")  # of a layer's keys and values, beside its projections in the files
# Where ModelOpt and AutoFP8 put them, in this order; vLLM reads these names, too.
_ELSEWHERE = (("k_proj.k_scale", "v_proj.v_scale"), ("k_proj.output_scale", "v_proj.output_scale"))
_ARGUMENTS = ("past_key_values", "cache", "past_key_value", "layer_past")  # what attention calls its cache
Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class CacheShape:
    """What one layer keeps of each token: `heads` keys of `key_dim` features, and as many values of `value_dim`.

    window: the last tokens that it keeps; None for all.
    """

    heads: int
    key_dim: int
    value_dim: int
    window: int | None = None

    def nbytes(self, cache: CacheType | None, dtype: torch.dtype) -> int:
        """Bytes of one token in a cache of this type, or of numbers of `dtype` where it is None."""
        if cache is None:
            return self.heads * (self.key_dim + self.value_dim) * dtype.itemsize
        return cache_token_bytes(cache, self.heads, self.key_dim, self.value_dim)


def cache_token_bytes(cache: CacheType, heads: int, key_dim: int, value_dim: int) -> int:
    """Bytes of one token's keys and values of a layer in a cache of this type."""
    return sum(bytes_per_token(cache, heads, dim) for dim in (key_dim, value_dim))


class _Between:
    """A cache whose keys and values are changed before they are put in."""

    def __init__(self, cache: Any, change: Change):
        self._cache, self._change = cache, change

    def update(self, keys: Tensor, values: Tensor, *arguments: Any, **options: Any) -> Any:
        return self._cache.update(*self._change(keys, values), *arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


@dataclass(eq=False)
class _Interception:
    """A hook before an attention's forward, which puts something between it and its cache."""

    argument: str
    place: int  # of the argument, among those without names
    change: Change

    def __call__(self, attention: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        cache = arguments[self.place] if self.place < len(arguments) else options.get(self.argument)
        between = _Between(DynamicCache() if cache is None else cache, self.change)
        if self.place < len(arguments):
            return (*arguments[: self.place], between, *arguments[self.place + 1 :]), options
        return arguments, {**options, self.argument: between}


def intercept(attention: nn.Module, change: Change) -> RemovableHandle:
    """From now on, change(keys, values) is what an attention puts into its cache, and reads from it."""
    names = list(inspect.signature(attention.forward).parameters)
    argument = next(name for name in _ARGUMENTS if name in names)
    hook = _Interception(argument, names.index(argument), change)
    return attention.register_forward_pre_hook(hook, with_kwargs=True)


def attentions(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Path in the model -> attention, of each module of the decoder's blocks that puts keys and values into a cache."""
    blocks = decoder(model)
    return {
        f"{blocks}.{path}": module
        for path, module in model.get_submodule(blocks).named_modules()
        if _fills_cache(type(module))
    }


def _fills_cache(kind: type[nn.Module]) -> bool:
    """Whether a class's forward takes a cache and calls its `update`."""
    forward = inspect.unwrap(kind.forward)
    if "update" not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return False
    return any(name in inspect.signature(forward).parameters for name in _ARGUMENTS)


class CacheRounding:
    """Rounds one layer's keys and values. k_scale, v_scale: as the files have them; None where the type is dynamic."""

    def __init__(self, cache: CacheType, k_scale: Tensor | None = None, v_scale: Tensor | None = None):
        self.cache = cache
        self._scales = (k_scale, v_scale)

    def __deepcopy__(self, memo: Any) -> "CacheRounding":
        """Itself: nothing of it changes, and a copied cache still knows whose codes it has."""
        return self

    def scale(self, place: int) -> Tensor | None:
        """The scale of keys (place 0) or values (1), as the files have it; None where the type is dynamic."""
        return self._scales[place]

    def encode(self, states: Tensor, place: int) -> Codes:
        """The codes of keys (place 0), or values (1), [batch, heads, tokens, dim]; see CacheType."""
        return self.cache.encode(states, self._scales[place])

    def decode(self, codes: Codes, place: int) -> Tensor:
        """What such codes stand for, float32 [batch, heads, tokens, dim]."""
        return self.cache.decode(codes, self._scales[place])

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self._scales[0] is not None and self._scales[0].device != keys.device:
            self._scales = tuple(None if s is None else s.to(keys.device) for s in self._scales)  # type: ignore[assignment]
        k_scale, v_scale = self._scales
        for scale, states, what in ((k_scale, keys, "keys"), (v_scale, values, "values")):
            if scale is not None and scale.numel() not in (1, heads := states.shape[1]):
                raise CheckpointError(f"{scale.numel()} scales of {what}, and the model has {heads} heads of them")
        return rounded(self.cache, keys, k_scale), rounded(self.cache, values, v_scale)


class CachePeaks:
    """The largest magnitude of each head's keys and values, [heads] each; of several threads, in whatever order.

    A copy of the attention, on another device, adds to the same.
    """

    def __init__(self) -> None:
        self.peaks: tuple[Tensor, Tensor] | None = None
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: Any) -> "CachePeaks":
        return self

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        own = tuple(states.detach().abs().amax((0, 2, 3)).to("cpu", torch.float32) for states in (keys, values))
        with self._lock:
            before = self.peaks or own
            self.peaks = torch.maximum(before[0], own[0]), torch.maximum(before[1], own[1])
        return keys, values


def interceptions(block: nn.Module) -> dict[Any, Change]:
    """Hook -> how it changes keys and values on their way to the cache, of all attentions in a block."""
    hooks = (hook for module in block.modules() for hook in module._forward_pre_hooks.values())
    return {hook: hook.change for hook in hooks if isinstance(hook, _Interception)}


@contextlib.contextmanager
def shapes_seen(model: PreTrainedModel) -> Iterator[dict[str, CacheShape]]:
    """Path of an attention -> what it put into its cache while this lasts, windows left out."""
    seen: dict[str, CacheShape] = {}

    def note(path: str, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        seen[path] = CacheShape(keys.shape[1], keys.shape[-1], values.shape[-1])
        return keys, values

    handles = [intercept(each, functools.partial(note, path)) for path, each in attentions(model).items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def cache_windows(model: PreTrainedModel) -> dict[int, int]:
    """Layer's number -> how many of the last tokens its cache keeps, of layers that do not keep all."""
    layers = DynamicCache(config=model.config).layers
    return {
        number: max(1, window - 1)  # the token that is read now has its place beside those that are kept
        for number, layer in enumerate(layers)
        if getattr(layer, "is_sliding", False) and (window := getattr(layer, "sliding_window", None))
    }


def unsupported(model: PreTrainedModel) -> str | None:
    """Why a model's keys and values cannot be rounded in its cache; None if they can."""
    config, name = model.config.get_text_config(decoder=True), type(model).__name__
    if getattr(config, "kv_lora_rank", None):
        return f"{name} keeps one latent vector for all heads (MLA), for which there is no type of cache"
    if getattr(config, "num_kv_shared_layers", None) or "reuse" in (getattr(config, "kv_sharing_modes", None) or ()):
        return f"{name} has layers that read the keys and values of others, whose scales they would need"
    if not attentions(model):
        return f"{name} keeps no keys and values in a cache of transformers"
    return None


def key_value_heads(model: PreTrainedModel, path: str) -> int | None:
    """How many heads of keys and values an attention has, by its config; None where that does not say."""
    config = getattr(model.get_submodule(path), "config", None) or model.config.get_text_config(decoder=True)
    counts = (getattr(config, key, None) for key in ("num_key_value_heads", "num_attention_heads"))
    return next((count for count in counts if isinstance(count, int) and count > 0), None)


def file_name(path: str, targets: Mapping[str, ParameterPath]) -> str:
    """What the files call a module of the model, by the tensors in it. targets: tensor's name -> where it goes."""
    for name, target in targets.items():
        inner = target.parameter.removeprefix(path)
        if inner != target.parameter and inner.startswith(".") and name.endswith(inner):
            return name.removesuffix(inner)
    return path


def scale_names(path: str, targets: Mapping[str, ParameterPath]) -> tuple[str, str]:
    """What the files call the scales of an attention's keys and of its values."""
    owner = file_name(path, targets)
    return f"{owner}.{SCALES[0]}", f"{owner}.{SCALES[1]}"


@dataclass(frozen=True)
class StoredCache:
    """A quantized cache as a checkpoint's headers have it.

    scales: attention's path -> the names of its tensors; () where the type is dynamic.
    """

    cache: CacheType
    scales: Mapping[str, tuple[str, ...]]

    @property
    def tensors(self) -> list[str]:
        return [name for names in self.scales.values() for name in names]


def stored_cache(
    checkpoint: Checkpoint, model: PreTrainedModel, cache: CacheType, targets: Mapping[str, ParameterPath]
) -> StoredCache:
    """The cache that a checkpoint's config describes, found in its headers.

    Args:
        targets: tensor's, or quantized layer's weight's, name -> where it goes.
    Raises:
        CheckpointError: the architecture is none whose cache can be rounded, or scales are missing.
    """
    if reason := unsupported(model):
        raise CheckpointError(f"{checkpoint.folder}: config.json quantizes the key-value cache, and {reason}")
    paths = list(attentions(model))
    if cache.dynamic:
        return StoredCache(cache, dict.fromkeys(paths, ()))
    scales = {path: scale_names(path, targets) for path in paths}
    for path, (keys, _) in scales.items():
        owner = keys.removesuffix(SCALES[0])
        others = [(f"{owner}{key}", f"{owner}{value}") for key, value in _ELSEWHERE]
        scales[path] = next((pair for pair in others if checkpoint.tensors.keys() >= set(pair)), scales[path])
    if missing := [name for names in scales.values() for name in names if name not in checkpoint.tensors]:
        raise CheckpointError(
            f"{checkpoint.folder}: config.json quantizes the key-value cache to {cache.name}, and scales are missing:\n"
            f"{listing(missing)}"
        )
    return StoredCache(cache, scales)


def round_cache(model: PreTrainedModel, checkpoint: Checkpoint, stored: StoredCache) -> None:
    """Let a model's attention read keys and values as the cache of its checkpoint gives them back.

    Raises:
        CheckpointError: see read_scale; or heads that the type does not fit.
    """
    for path, names in stored.scales.items():
        scales = [read_scale(checkpoint, stored.cache, name, key_value_heads(model, path)) for name in names]
        intercept(model.get_submodule(path), CacheRounding(stored.cache, *scales))
