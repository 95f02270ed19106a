"""bitpress: quantize Transformer checkpoints to fewer bits, and know what that costs.

import bitpress

bitpress.quantize("org/model", "int4-g128", "model-int4")
model, tokenizer = bitpress.load("model-int4")

What the package `bitpress` offers (see package/__init__.py) is defined from here.
"""

import sys

from .system import program

if program.is_command():  # before anything is imported that the current folder may have too
    program.leave_current_folder()

    from .system import interrupts

    interrupts.handle(interrupts.end_now)  # until there is something to close

from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import BitpressError

if TYPE_CHECKING:
    from .api import convert, evaluate, load, optimize, plan, publish, quantize
    from .hf import BitpressConfig
    from .objects import Recipe

__all__ = [
    "BitpressConfig", "BitpressError", "Recipe", "convert", "evaluate", "load", "optimize", "plan", "publish",
    "quantize",
]  # fmt: skip


class _Function(property):
    """A function of the API, or a class. Three of them are called like folders of this package, and the functions win.

    They bring torch and transformers, which take seconds to import: only when they are used.
    """

    def __init__(self, name: str):
        def get(package: ModuleType) -> Any:
            if name == "BitpressConfig":  # registers bitpress with transformers, which nobody else has asked for
                from .hf import BitpressConfig

                return BitpressConfig
            from . import api, objects

            return getattr(objects if name == "Recipe" else api, name)

        # the import system sets an attribute for each folder that it loads, and finds folders without it
        super().__init__(get, lambda package, folder: None)


_Package = type("_Package", (ModuleType,), {name: _Function(name) for name in __all__ if name != "BitpressError"})
sys.modules[__name__].__class__ = _Package
