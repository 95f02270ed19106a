"""Checkpoints that no run of bitpress made, measured as runs are, each into a folder like that of a run."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.load import load_eval
from ..config.schema import Eval
from ..data.text import Text, read_text
from ..errors import BitpressError, ConfigError
from ..hub.download import Source, resolve
from ..storage import files as store
from ..storage import journal
from ..storage.checkpoint import INDEX, SINGLE, Checkpoint
from ..storage.fingerprint import check_fingerprint
from . import process, results
from .measure import Resume
from .metrics import METRICS, read_metrics

Say = Callable[[str], None]
_UNFINISHED = ("evaluation.partial", "predictions.partial")


@dataclass(frozen=True)
class Subject:
    """What is measured, and how. baseline: the unquantized model; None for that itself, or where it is not known."""

    source: Source
    baseline: Source | None
    settings: Eval
    device: str

    @staticmethod
    def of(source: Source, baseline: Source | None, settings: Eval, device: str) -> "Subject":
        itself = baseline and source.folder.resolve() == baseline.folder.resolve()
        return Subject(source, None if itself else baseline, settings, device)

    @property
    def model(self) -> Source:
        return self.baseline or self.source

    def marks(self, text: Text) -> dict[str, Any]:
        """Everything that its figures depend on."""
        files: dict[str, Any] = {}
        for role, source in (("checkpoint", self.source), ("baseline", self.baseline)):
            if source:
                identity = Checkpoint(source.folder).identity()
                files |= {f"{role}.{name}": value for name, value in {**source.to_dict(), **identity}.items()}
        return process.marks(self.settings, self.device, text, files)

    def config(self) -> dict[str, Any]:
        """As much of a run's config as there is."""
        folder = self.model.folder.resolve()
        name = str(folder) if self.model.id == folder.name else self.model.id
        models = [{"id": name, "revision": self.model.revision}]
        return {"models": models, "eval": self.settings.model_dump(mode="json"), "device": self.device}


def is_checkpoint(path: Path) -> bool:
    return (path / SINGLE).exists() or (path / INDEX).exists()


def examine(subject: Subject, folder: Path, command: str) -> dict[str, Any]:
    """Measure it; metrics.json, report.md and report.html are in `folder` then. Repeated, it reads what is there, or
    goes on where it was interrupted.

    Args:
        command: what the user typed, for the report.
    Raises:
        ConfigError: the folder holds figures of something else.
    """
    process.check_tasks(subject.settings)
    text = read_text(subject.settings.text)
    subject.source.check_output(folder)
    marks, path = subject.marks(text), folder / METRICS
    store.make_folder(folder)
    with journal.locked(folder):
        if path.exists():
            check_fingerprint(path, marks)
            return read_metrics(path)
        kept = [folder / name for name in _UNFINISHED]
        resume = Resume(str(kept[0].resolve()), marks, str(kept[1].resolve()), marks)
        original = subject.baseline.folder if subject.baseline else None
        measured = process.measure(subject.source.folder, original, subject.settings, subject.device, folder, resume)
        measured |= {"check": None, "fingerprint": marks, "command": command}
        measured["seconds"] = {"evaluate": measured["seconds"]}
        made = results.made_elsewhere(subject.source, subject.baseline, subject.config())
        metrics = results.assemble(subject.model, text, made, measured)
        results.write_report(folder, [metrics])
        store.write_json(path, metrics)
        for unfinished in kept:
            process.forget(unfinished)
        return metrics


def measure_like(
    runs: Sequence[dict[str, Any]], checkpoints: Sequence[Path], folder: Path, command: str, say: Say
) -> list[Path]:
    """Measure checkpoints as the runs beside which they are to stand were: against their model, by their settings.

    Args:
        runs: metrics.json of each.
        folder: each checkpoint's figures are kept in a folder of their own in it, named after all that they depend on.
    Returns:
        The metrics.json of each checkpoint.
    Raises:
        ConfigError: the runs are not of one model, or it or their text is not there any more.
    """
    how = f"`bitpress eval {checkpoints[0]} --baseline MODEL -o DIR` measures it by itself, and DIR compares like a run"
    if len({json.dumps([run["model"]["id"], run["model"].get("revision")]) for run in runs}) != 1:
        raise ConfigError(f"{checkpoints[0]} is no run, and to be measured like one it takes runs of one model; {how}")
    try:
        baseline, settings, device = _circumstances(runs[0])
    except BitpressError as error:
        raise ConfigError(f"{checkpoints[0]} cannot be measured like the runs: {error}; {how}") from error
    found = []
    for checkpoint in checkpoints:
        subject = Subject.of(resolve(str(checkpoint)), baseline, settings, device)
        marks = json.dumps(subject.marks(read_text(settings.text)), sort_keys=True)
        own = folder / f"{subject.source.id}-{hashlib.sha256(marks.encode()).hexdigest()[:8]}"
        if not (own / METRICS).exists():
            say(f"{checkpoint}: measured like the runs, against {baseline.id}")
        examine(subject, own, command)
        found.append(own / METRICS)
    return found


def _circumstances(run: dict[str, Any]) -> tuple[Source, Eval, str]:
    """A run's model, the settings that it was measured by, and the device."""
    config, model = run.get("config") or {}, run["model"]
    settings = load_eval({**config.get("eval", {}), "dtype": run["protocol"].get("dtype") or "auto"})
    if read_text(settings.text).sha256 != run["protocol"].get("text_sha256"):
        raise ConfigError(f"the text {settings.text} is not what they read")
    for given in config.get("models", []):
        folder = Path(given["id"]).expanduser().resolve()  # of a local model, only its name is the model's id
        if given["id"] == model["id"] or (folder.name == model["id"] and folder.is_dir()):
            return resolve(given["id"], model.get("revision")), settings, config.get("device", "auto")
    raise ConfigError(f"their model {model['id']} is not where it was")
