"""bitpress: quantize Transformer checkpoints to fewer bits, and know what that costs.

    import bitpress

    bitpress.quantize("org/model", "int4-g128", "model-int4")
    model, tokenizer = bitpress.load("model-int4")

This is the package `bitpress` itself, whose other folders lie beside this one (see pyproject.toml). What it offers is
imported when it is used: torch and transformers take seconds.
"""

import os

# Nothing that Python has not loaded at its start may be imported here: the current folder may still be searched.
TYPE_CHECKING = False
if os.path.basename(os.path.dirname(__file__)) == "package":  # an editable install: kernels/ has no __init__.py
    __path__.append(os.path.dirname(os.path.dirname(os.path.dirname(__file__))))

if TYPE_CHECKING:
    from typing import Any

    from bitpress.pipeline.api import convert, evaluate, load, optimize, plan, publish, quantize
    from bitpress.pipeline.errors import BitpressError
    from bitpress.pipeline.hf import BitpressConfig
    from bitpress.pipeline.objects import Recipe

    __version__: str

__all__ = [
    "BitpressConfig", "BitpressError", "Recipe", "__version__", "convert", "evaluate", "load", "optimize", "plan",
    "publish", "quantize",
]  # fmt: skip


def __getattr__(name: str) -> "Any":
    if name == "__version__":
        from importlib.metadata import version

        return version("bitpress")
    if name in __all__:
        from bitpress import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'bitpress' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
