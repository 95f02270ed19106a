"""The stored scales of a quantized key-value cache, read from untrusted files."""

from math import prod

from torch import Tensor

from bitpress.kernels.caches.base import CacheType
from bitpress.kernels.kv_cache import static

from ..errors import CheckpointError
from ..storage.checkpoint import Checkpoint


def read_scale(checkpoint: Checkpoint, cache: CacheType, name: str, heads: int | None = None) -> Tensor:
    """A scale of a checkpoint's files, checked.

    Args:
        heads: of keys and values; None where it is not known.
    Raises:
        CheckpointError: its dtype, its shape or its values are not those of this type of cache.
    """
    scale, own = checkpoint.read(name), static(cache)
    assert own is not None, "a dynamic type stores no scales"
    shape, dtypes = own.layout(heads or scale.numel())
    where = f"{checkpoint.folder}: {name}"
    if scale.dtype not in dtypes:
        raise CheckpointError(f"{where} has dtype {scale.dtype}, expected {' or '.join(map(str, dtypes))}")
    if scale.numel() != prod(shape):
        raise CheckpointError(f"{where} has shape {list(scale.shape)}, expected {list(shape)}")
    try:
        own.check(scale)
    except ValueError as error:
        raise CheckpointError(f"{where} {error}") from error
    return scale.reshape(shape)
