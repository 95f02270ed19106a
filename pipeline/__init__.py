"""bitpress: press Transformer checkpoints into fewer bits, and know what that cost.

from bitpress.pipeline import quantize, load

quantize("org/model", "int4-g128", "model-int4")
model, tokenizer = load("model-int4")
"""

from .api import evaluate, load, quantize
from .errors import BitpressError

__all__ = ["BitpressError", "evaluate", "load", "quantize"]
