"""Evaluates a model in a fresh process, into a folder with metrics.json and report; reuses every figure that holds."""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitpress.eval.measure import tasks

from ..config.schema import Eval
from ..errors import ConfigError, listing
from ..hub.download import Source
from ..storage import files
from ..storage.fingerprint import Fingerprint, differences, digest, refuse, stage
from ..system.packages import install
from ..system.versions import versions
from . import worker
from .conditions import Conditions
from .measure import Resume
from .metrics import METRICS, read_metrics, sealed
from .results import Origin, assemble, write_report

Say = Callable[[str], None]
UNFINISHED = "evaluation.partial"  # windows that are scored, until all are
PREDICTIONS = "predictions.partial"  # the baseline's, until all runs that are compared with it are done


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and against what.

    Attributes:
        model: the unquantized model; where it is not known, the checkpoint itself.
        checkpoint: the folder of what is measured. baseline: of what it is compared with; None for nothing.
        origin: how the checkpoint came about.
        artifact: what tells the files that are measured from others; see Conditions.fingerprint.
        predictions: where the baseline's predictions are kept, and what tells its files from others.
        verify: proves that the files are what was quantized, and returns the proof's figures; None where nothing was.
        dequantize: see `measure`.
    """

    model: Source
    checkpoint: Path
    baseline: Path | None
    origin: Origin
    artifact: Fingerprint
    predictions: tuple[Path, Fingerprint]
    verify: Callable[[], dict[str, Any]] | None = None
    dequantize: bool = False


def require_lm_eval(settings: Eval) -> None:
    """Raises ConfigError where tasks are asked for and lm-eval is not there."""
    if settings.tasks and not tasks.available():
        raise ConfigError(f"eval.tasks needs the lm-eval package; {install('lm-eval')}")


def remove_partial(folder: Path) -> None:
    """Remove what was kept for the case that a process is interrupted."""
    if folder.exists():
        files.remove_folder(folder)


def evaluate(
    subject: Subject,
    conditions: Conditions,
    folder: Path,
    say: Say = lambda line: None,
    seconds: dict[str, float] | None = None,
    beside: Path | None = None,
) -> dict[str, Any]:
    """The metrics of a model: those in `folder` where they hold, else measured; its report is written beside them.

    Figures of the same files are reused stage by stage: speed alone is measured anew on another machine, everything
    under another protocol or with `conditions.redo`. An interrupted evaluation goes on where it stopped.

    Args:
        folder: locked by the caller.
        seconds: what came before took, by stage.
        beside: the metrics.json of the baseline, for the report.
    Raises:
        ConfigError: the folder holds figures of other files.
    """
    path, now = folder / METRICS, conditions.fingerprint(subject.artifact)
    stages = ["quality", "speed"]
    if path.exists():
        metrics = read_metrics(path)
        before = metrics.get("fingerprint") or {}
        refuse(folder, stage(before, "artifact"), subject.artifact)
        changes = {name: differences(stage(before, name), stage(now, name)) for name in stages}
        if conditions.redo:
            say("measured before, and asked for again")
        elif changes["quality"]:
            say(f"measured before in another way; measured again:\n{listing(changes['quality'])}")
        elif changes["speed"]:
            say(f"quality was measured before; speed and memory are measured here:\n{listing(changes['speed'])}")
            stages = ["speed"]
        else:
            say("measured before")
            return metrics
    if stages == ["speed"]:
        costs = measure(
            subject.checkpoint, subject.baseline, conditions.settings, conditions.device, folder,
            speed_only=True, dequantize=subject.dequantize,
        )  # fmt: skip
        metrics["seconds"] |= {"speed": costs.pop("seconds")}
        kernels = costs.pop("kernels")
        metrics |= costs | {"kernels": kernels if metrics["kernels"] else {}}
        metrics |= {"versions": versions(), "config": subject.origin.config, "fingerprint": now}
    else:
        reload = None
        if subject.verify:
            say("reload in a fresh process, compared with the model in memory")
            reload = subject.verify()
        say("measure in a fresh process")
        windows = {**subject.artifact, **stage(now, "quality")}
        predictions, baseline = subject.predictions[0], {**subject.predictions[1], **stage(now, "quality")}
        resume = Resume(_key(folder / UNFINISHED, windows), windows, _key(predictions, baseline), baseline)
        measured = measure(
            subject.checkpoint, subject.baseline, conditions.settings, conditions.device, folder, resume,
            dequantize=subject.dequantize,
        )  # fmt: skip
        measured["seconds"] = {**(seconds or {}), "evaluate": measured["seconds"]}
        metrics = assemble(subject.model, subject.origin, conditions, measured | {"reload": reload, "fingerprint": now})
    write_metrics(folder, metrics, beside)
    remove_partial(folder / UNFINISHED)
    return metrics


def write_metrics(folder: Path, metrics: dict[str, Any], beside: Path | None) -> None:
    """Write the report, next to the figures of the baseline in `beside`, if it is there; then metrics.json, sealed."""
    write_report(folder, [*([read_metrics(beside)] if beside and beside.exists() else []), metrics])
    metrics |= sealed(metrics)
    files.write_json(folder / METRICS, metrics)


def _key(folder: Path, fingerprint: Fingerprint) -> str:
    """A folder in `folder` of its own for each fingerprint: windows of another protocol are never taken up."""
    return str((folder / digest(fingerprint)[:8]).resolve())


def measure(
    artifact: Path,
    baseline: Path | None,
    settings: Eval,
    device: str,
    folder: Path,
    resume: Resume | None = None,
    speed_only: bool = False,
    dequantize: bool = False,
) -> dict[str, Any]:
    """Everything that is measured of one model, in a fresh process; `seconds` is what it took in all.

    Args:
        baseline: the unquantized model that it is compared with; None where there is none.
        folder: where the process keeps the baseline's predictions, unless `resume` says where.
        resume: where it keeps what is finished; None: nowhere.
        speed_only: only what is the machine's: speed, memory, kernels.
        dequantize: FP8 and FP4 weights are measured as what they stand for, inputs left alone, as a source is read.
    """
    start = time.perf_counter()
    chosen = settings.model_dump()
    if isinstance(settings.text, str) and os.path.isfile(text := os.path.expanduser(settings.text)):
        chosen["text"] = os.path.abspath(text)  # the process runs in another folder
    request = {
        "artifact": str(artifact.resolve()),
        "baseline": str(baseline.resolve()) if baseline else None,
        "eval": chosen,
        "device": device,
        "folder": str(folder.resolve()),
        "resume": asdict(resume) if resume else None,
        "speed_only": speed_only,
        "dequantize": dequantize,
    }
    return {**worker.call("measure", request), "seconds": time.perf_counter() - start}
