"""Measures a model in a fresh process, and says what its figures depend on."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bitpress.eval.measure import tasks

from ..config.schema import Eval
from ..data.text import Text
from ..errors import ConfigError
from ..storage import files as store
from ..system.device import pick_device
from ..system.machine import machine
from ..system.versions import versions
from . import worker
from .measure import Resume


def check_tasks(settings: Eval) -> None:
    """Raises ConfigError where tasks are asked for and lm-eval is not there."""
    if settings.tasks and not tasks.available():
        raise ConfigError("eval.tasks needs the lm-eval package; pip install 'bitpress[tasks]'")


def marks(settings: Eval, device: str, text: Text, files: dict[str, Any]) -> dict[str, Any]:
    """Everything that measurements depend on, flat.

    Args:
        files: what tells the checkpoints that are measured from others.
    """
    plain = settings.model_dump(mode="json")
    found = {f"eval.{key}": json.dumps(value, sort_keys=True) for key, value in plain.items()}
    found |= {"text.sha256": text.sha256, "device": device}
    found |= {f"versions.{name}": value for name, value in versions().items()}
    described = machine(pick_device(device))
    return found | {f"machine.{key}": described[key] for key in ("cpu", "device", "threads")} | files


def forget(folder: Path) -> None:
    """Remove what was kept for a process that might have been interrupted, and was not."""
    if folder.exists():
        store.remove_folder(folder)


def measure(
    artifact: Path,
    baseline: Path | None,
    settings: Eval,
    device: str,
    folder: Path,
    resume: Resume | None = None,
) -> dict[str, Any]:
    """Everything that is measured of one model, in a fresh process; `seconds` is what it took in all.

    Args:
        baseline: the unquantized model that it is compared with; None where there is none.
        folder: where the process leaves its answer.
        resume: where it keeps what is finished; None: nowhere.
    """
    start = time.perf_counter()
    request = {
        "artifact": str(artifact.resolve()),
        "baseline": str(baseline.resolve()) if baseline else None,
        "eval": settings.model_dump(),
        "device": device,
        "folder": str(folder.resolve()),
        "resume": asdict(resume) if resume else None,
    }
    return {**worker.call("measure", request, folder), "seconds": time.perf_counter() - start}
