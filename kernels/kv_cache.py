"""Types of quantized key-value caches by name, and what rounding does to keys and values."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from .caches.base import CacheType, StaticCacheType
from .discovery import discover


def cache_types() -> tuple[type[CacheType], ...]:
    """Every type of kernels/caches/."""
    return discover("bitpress.kernels.caches")


def cache_examples() -> list[str]:
    """Common names of cache types: those that messages suggest and `bitpress list` shows."""
    return [name for kind in cache_types() for name in kind.examples]


def parse_cache(name: str) -> CacheType:
    """The cache type of this name: fp8, int8, int8-g64, int4-g64.

    Raises:
        ValueError: no registered type has such names, or a value is impossible.
    """
    for kind in cache_types():
        if (cache := kind.parse(name)) is not None:
            return cache
    raise ValueError(f"{name!r} is no type of cache; use {', '.join(kind.forms for kind in cache_types())}")


def described_cache(description: Mapping[str, Any]) -> CacheType | None:
    """The cache type that a `kv_cache_scheme` of compressed-tensors describes; None if no registered one is."""
    kinds = (kind.from_description(description) for kind in cache_types())
    return next((cache for cache in kinds if cache is not None), None)


def static(cache: CacheType) -> StaticCacheType | None:
    """The type, where its scales are calibrated and stored; None where it computes them from what comes."""
    return None if cache.dynamic else cast(StaticCacheType, cache)


def rounded(cache: CacheType, states: Tensor, scale: Tensor | None) -> Tensor:
    """States [batch, heads, tokens, dim] as a cache of this type gives them back, in their own dtype.

    Args:
        scale: of the layer's keys, or its values; None where the type is dynamic.
    """
    whole = cache.decode(cache.encode(states, scale), scale)
    return whole.masked_fill_(states.isnan(), torch.nan).to(states.dtype)  # a code could not say so


def bytes_per_token(cache: CacheType, heads: int, dim: int) -> int:
    """What the keys, or the values, of one token take in this cache, counted on codes that are made."""
    calibrated = static(cache)
    scale = calibrated.scale(torch.ones(heads)) if calibrated else None
    return sum(tensor.nbytes for tensor in cache.encode(torch.ones(1, heads, 1, dim), scale).values())
