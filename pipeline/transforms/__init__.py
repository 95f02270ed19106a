"""What a recipe may do to a block before its layers are quantized, one file each; `PLUGINS` says what a file adds."""

from bitpress.kernels.discovery import discover

from .base import Transform


def registry() -> dict[str, Transform]:
    """All transforms by name, in the order of their ranks."""
    return {transform.name: transform for transform in discover(__name__)}
