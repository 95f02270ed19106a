"""The key-value cache of a model of transformers: what its forward calls it."""

import inspect
from typing import Any

from torch import nn

_NAMES = ("cache", "past_key_values")  # from transformers 5.24 on, and before


def cache_name(model: nn.Module) -> str | None:
    """How a model's forward takes its key-value cache and its output returns it; None where it keeps another state."""
    taken = inspect.signature(model.forward).parameters
    return next((name for name in _NAMES if name in taken), None)


def cache_of(output: Any) -> Any:
    """The key-value cache in a model's output, or in what `generate` returned."""
    return next((getattr(output, name) for name in _NAMES if getattr(output, name, None) is not None), None)
