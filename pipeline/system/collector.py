"""Python's collector of reference cycles, while modules are imported or a model is built."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Import without collecting: modules are objects by the hundred thousand, and hardly one of them is garbage.

    With torch and transformers, the collector's passes are a quarter of the processor time of the imports. Afterwards
    it leaves alone all that there is by then: to look through the modules again and again would cost as much.
    """
    with no_collection():
        try:
            yield
        finally:
            gc.freeze()


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Meanwhile nothing is collected: one pass over all objects of torch and transformers takes 0.2 to 0.3 s, and a
    tokenizer's file alone makes objects enough to set one off."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
