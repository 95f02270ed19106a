"""Python's collector of reference cycles, while modules are imported."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Import without collecting: modules are objects by the hundred thousand, and hardly one of them is garbage.

    With torch and transformers, the collector's passes are a quarter of the processor time of the imports. Afterwards
    it leaves alone all that there is by then: to look through the modules again and again would cost as much.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
