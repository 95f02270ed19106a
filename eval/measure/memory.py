"""The memory of a model: bytes of weights, cache and activations, and the peak of the process that runs it."""

import contextlib
import math
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from . import container_memory
from .cache import cache_name, cache_of

CARDS = (8, 12, 16, 24, 48, 80)  # GiB: common sizes of graphics cards
LENGTHS = (4096, 32_768, 131_072)  # tokens of one sequence, whose cache is counted in advance
RESERVE = 1 << 30  # bytes of a card that CUDA and its libraries need: half a GiB or more
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage counted once (tied weights are one).

    A tensor in oneDNN's own layout has no storage that can be asked: its elements are counted.
    """
    opaque, storages = 0, {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_mkldnn:
            opaque += tensor.numel() * tensor.element_size()
        else:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return opaque + sum(storages.values())


def peak_rss_bytes() -> int:
    """The most memory that this process has held so far, or since a Peak began, in bytes.

    Linux's ru_maxrss is no use here: a new process inherits the value of the process that started it.
    """
    if _STATUS.exists():
        return _status("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(key: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def peak_cuda_bytes() -> int | None:
    """The most bytes that torch has allocated on the current CUDA device so far, or since a Peak began; None without a
    device."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free, left = psutil.virtual_memory().available, container_memory.left()
    return free if left is None else max(0, min(free, left))


class Peak:
    """How far memory rises while a `with` block runs: memory of the CUDA device, or on a CPU memory of this process.

    growth: bytes above the memory held at the start; None where the system cannot tell (only Linux can reset a
        process's peak). rss, cuda: peak_rss_bytes and peak_cuda_bytes at the block's end.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.growth: int | None = None
        self.rss = 0
        self.cuda: int | None = None

    def __enter__(self) -> "Peak":
        self.rss = peak_rss_bytes()
        self._start: int | None = None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self.cuda = peak_cuda_bytes()
            self._start = torch.cuda.memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            return self
        with contextlib.suppress(OSError):  # not Linux, or a container that forbids it: growth stays None
            _CLEAR.write_text("5")
            self._start = _status("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        now = peak_cuda_bytes() if self._device.type == "cuda" else peak_rss_bytes()
        if self._start is not None and now is not None:
            self.growth = max(0, now - self._start)
        self.rss = max(self.rss, peak_rss_bytes())
        peaks = (self.cuda, peak_cuda_bytes())
        self.cuda = max((peak for peak in peaks if peak is not None), default=None)


def cache_bytes(cache: Any) -> int | None:
    """Bytes of the keys and values in a cache of transformers; None for another kind of cache."""
    layers = getattr(cache, "layers", None)
    tensors = [getattr(layer, part, None) for layer in layers or [] for part in ("keys", "values")]
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        return None
    return sum(tensor.nbytes for tensor in tensors)  # type: ignore[union-attr]


Windows = Sequence[
    Mapping[str, float]
]  # {"tokens": the most that a layer keeps, "bytes_per_token": of all such layers}


# A layer's heads of keys and values, and the features of a key and of a value -> bytes of a token in it.
TokenBytes = Callable[[int, int, int], float]


def cache_growth(cache: Any, token_bytes: TokenBytes | None = None) -> tuple[float, list[dict[str, float]]]:
    """Bytes that each further token takes for ever, and the windows of layers that keep the last tokens only.

    Args:
        cache: one of transformers that `cache_bytes` can count, after a prompt.
        token_bytes: of a cache that keeps codes in place of these keys and values; None for the tensors as they are.
    """
    growing, windows = 0.0, dict[int, float]()
    for layer in cache.layers:
        if token_bytes is None:
            per_token = (layer.keys.nbytes + layer.values.nbytes) / layer.keys.shape[-2]
        else:
            heads, dim = layer.keys.shape[1], layer.keys.shape[-1]
            per_token = layer.keys.shape[0] * token_bytes(heads, dim, layer.values.shape[-1])
        window = getattr(layer, "sliding_window", None) if getattr(layer, "is_sliding", False) else None
        if window is None:
            growing += per_token
        else:  # the token that is read now has its place beside those that are kept
            windows[max(1, window - 1)] = windows.get(max(1, window - 1), 0.0) + per_token
    return growing, [{"tokens": tokens, "bytes_per_token": size} for tokens, size in sorted(windows.items())]


def cache_size(tokens: int, per_token: float, windows: Windows = ()) -> float:
    """Bytes of the cache of so many tokens: per_token of each, and of each window what it keeps."""
    return tokens * per_token + sum(min(tokens, window["tokens"]) * window["bytes_per_token"] for window in windows)


@torch.inference_mode()
def prefill(model: nn.Module, ids: Tensor, token_bytes: TokenBytes | None = None) -> tuple[dict[str, Any], Peak]:
    """Measures the memory of reading a prompt, with a cache for generation, and logits of the last token only.

    Args:
        ids: int64 [n], on the model's device. token_bytes: of a quantized cache, see cache_growth.
    Returns:
        {"prompt": n, "kv_cache_bytes_per_token": what each further token takes however many there are,
        "activation_peak_bytes": the most beside weights and cache}, each None where it cannot be measured; where layers
        have a sliding window, which stop growing, also {"kv_cache_windows": see cache_growth}; for a quantized cache
        also {"kv_cache": {"bytes_per_token", "windows"}}; and the Peak.
    """
    costs: dict[str, Any] = {"prompt": ids.numel(), "kv_cache_bytes_per_token": None, "activation_peak_bytes": None}
    with Peak(ids.device) as peak:
        if cache_name(model) is None:  # the model has a state instead of a cache
            return costs, peak
        output = model(input_ids=ids.unsqueeze(0), use_cache=True, logits_to_keep=1)
    if (cache := cache_bytes(cache_of(output))) is not None:
        costs["kv_cache_bytes_per_token"], windows = cache_growth(cache_of(output))
        costs |= {"kv_cache_windows": windows} if windows else {}
        if token_bytes is not None:
            per_token, windows = cache_growth(cache_of(output), token_bytes)
            costs["kv_cache"] = {"bytes_per_token": per_token, "windows": windows}
        costs["activation_peak_bytes"] = None if peak.growth is None else max(0, peak.growth - cache)
    return costs, peak


def fitting(
    weights: int, cache: float | None, activations: float | None, longest: int | None, windows: Windows = ()
) -> list[dict[str, Any]]:
    """The longest context that fits on each card beside the weights, at batch 1. It is computed, not tried: the largest
    one with

    RESERVE + weights + cache_size(context, cache, windows) + context * activations <= card, at most `longest`.

    Args:
        weights: bytes.
        cache, activations: bytes per token; activations grow with the prompt, because attention works piece by piece.
        longest: tokens that the model can read. windows: of layers that keep the last tokens only.
    Returns:
        For each of CARDS {"card_gib", "context": tokens, 0 where the weights do not fit, None where it is not known}.
    """
    fits = []
    for card in CARDS:
        free = card * (1 << 30) - RESERVE - weights
        context: float | None = 0 if free < 0 else None
        if free >= 0 and cache is not None:
            context = _longest_context(free, cache, activations or 0, windows)
        if context is not None:
            context = min(context, math.inf if longest is None else longest)
            context = None if context == math.inf else int(context)
        fits.append({"card_gib": card, "context": context})
    return fits


def _longest_context(free: float, cache: float, activations: float, windows: Windows) -> float:
    """The most tokens that take at most `free` bytes; infinity where they take none after the windows."""
    begin, per_token = 0.0, cache + activations + sum(window["bytes_per_token"] for window in windows)
    for window in sorted(windows, key=lambda window: window["tokens"]):
        used = (window["tokens"] - begin) * per_token
        if used > free:
            break
        begin, free, per_token = window["tokens"], free - used, per_token - window["bytes_per_token"]
    return begin + free / per_token if per_token > 0 else math.inf
