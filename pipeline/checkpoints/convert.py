"""What `bitpress convert` makes of a quantized checkpoint: another format, or a model that another program makes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ConfigError, nearest
from ..formats import registry
from ..storage.checkpoint import Checkpoint
from ..system.progress import OnStep
from . import onnx_export
from .conversion import examine, notes, unfinished, write

# What is no format, as bitpress does not read it back: made by another program, and proven by what it computes.
EXPORTS: dict[str, Callable[[Checkpoint, dict[str, Any], Path, OnStep], list[str]]] = {
    onnx_export.NAME: onnx_export.export,
}


def convert(
    checkpoint: Checkpoint,
    source: dict[str, Any],
    to: str,
    out: Path,
    on_step: OnStep = lambda done, total: None,
    template: Path | None = None,
) -> list[str]:
    """Make `out`, a whole folder in the format `to`; nothing of that name appears before it is whole.

    Args:
        source: what to record of where the checkpoint came from ({"id", "revision"}).
        on_step: called with (shards done, shards in all).
        template: see Format.with_template.
    Returns:
        Sentences on what was done.
    Raises:
        ConfigError: the format cannot hold this checkpoint, or the output cannot be written there.
        NumericsError: the format would round the scales.
        CheckpointError: the checkpoint is not whole.
    """
    targets = sorted([*(name for name, format in registry().items() if format.convertible), *EXPORTS])
    if to not in targets:
        hint = nearest(to, targets) or f"; use {', '.join(targets)}"
        raise ConfigError(f"nothing can be converted to {to!r}{hint}")
    if to in EXPORTS:
        if template:
            raise ConfigError(f"--template is for GGUF files, and {to} takes none; leave it out")
        return EXPORTS[to](checkpoint, source, out, on_step)
    format = registry()[to]
    conversion = examine(checkpoint, format.with_template(template) if template else format)
    with unfinished(out, int(1.05 * sum(info.nbytes for info in checkpoint.tensors.values()))) as folder:
        write(conversion, source, folder, on_step)
        checkpoint.check_unchanged()
    return notes(conversion)
