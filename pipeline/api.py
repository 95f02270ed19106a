"""The library's functions, as small as the command line's."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import store
from .checkpoint import Checkpoint
from .config import load_eval
from .errors import BitpressError
from .loading import load
from .source import resolve
from .stages import evaluate as evaluation
from .stages.quantize import Recipe
from .stages.quantize import quantize as quantize_checkpoint

__all__ = ["evaluate", "load", "quantize"]

OnStep = Callable[[int, int], None]


def quantize(
    model: str | Path,
    scheme: str,
    output: str | Path,
    revision: str | None = None,
    recipe: dict[str, Any] | None = None,
    on_step: OnStep = lambda done, total: None,
) -> list[str]:
    """Quantize a model into a folder that bitpress and other runtimes load; call again to go on after a crash.

    Args:
        model: a Hub id or a local folder.
        scheme: such as "int4-g128", "int3-channel-asym", "int8-dynamic", "nf4", "nf4-dq".
        recipe: "method", "format" and "skip" where the defaults are not wanted.
    Returns:
        Notes on what happened on the way.
    Raises:
        BitpressError: what, got, expected, and what to do; nothing finished is lost.
    """
    chosen = Recipe.make(scheme, **(recipe or {}))
    source = resolve(str(model), revision)
    out = Path(output).expanduser()
    source.check_output(out)
    work = out.with_name(f"{out.name}.partial")
    store.make_folder(work)
    with store.locked(work):
        try:
            notes = quantize_checkpoint(Checkpoint(source.folder), source.to_dict(), chosen, out, work, on_step)
        except BitpressError:
            store.remove_unused(work)
            raise
        store.remove_folder(work)
    return notes


def evaluate(
    model: str | Path, revision: str | None = None, device: str = "auto", settings: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Measure any checkpoint, quantized or not: perplexity, memory and speed, in a fresh process.

    Args:
        settings: the keys of a config's eval section, such as {"text": "wiki.txt", "context": 2048, "windows": 20}.
    """
    source = resolve(str(model), revision)
    with tempfile.TemporaryDirectory(prefix="bitpress-") as folder:
        return evaluation.measure(source.folder, None, load_eval(settings or {}), device, Path(folder))
