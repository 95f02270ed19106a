"""What it depends on whether a runtime loads a checkpoint: of one that lies on the disk, or of one that is planned."""

from collections.abc import Iterable, Mapping
from typing import Any

from bitpress.kernels.caches.base import CacheType
from bitpress.kernels.scheme import Scheme

from ..formats.base import Facts, Format


def facts_of(
    format: Format,
    model: Mapping[str, Any],
    layers: Mapping[str, tuple[Scheme, tuple[int, int]]],
    kept: Iterable[str],
    ordered: bool = False,
    cache: CacheType | None = None,
) -> Facts:
    """The facts of a quantized checkpoint.

    Args:
        model: what its model decides, see headers.model_facts.
        layers: quantized layer -> its scheme, and [out, in].
        kept: linear layers that are not quantized. ordered: whether some layer has act-order. cache: what keys and
            values are rounded to.
    """
    return Facts(
        format=format,
        schemes={name: scheme for name, (scheme, _) in layers.items()},
        ordered=ordered,
        shapes={name: shape for name, (_, shape) in layers.items()},
        kept=frozenset(kept),
        cache=cache,
        **{
            **model,
            **{name: frozenset(model[name]) for name in ("experts", "embeddings")},
            "heads": tuple(model["heads"]),
        },
    )
