"""bitpress: press Transformer checkpoints into fewer bits, and know what that cost.

from bitpress.pipeline import quantize, load

quantize("org/model", "int4-g128", "model-int4")
model, tokenizer = load("model-int4")
"""

from typing import TYPE_CHECKING, Any

from .errors import BitpressError

if TYPE_CHECKING:
    from .api import convert, evaluate, load, publish, quantize

__all__ = ["BitpressError", "convert", "evaluate", "load", "publish", "quantize"]


def __getattr__(name: str) -> Any:
    """The functions bring torch and transformers, which take seconds to import: only when they are used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import api

    return getattr(api, name)
