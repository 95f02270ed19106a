"""External checkpoints, which no run of bitpress made: evaluated as runs are, each into a folder like that of a run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config.load import load_eval
from ..config.schema import Eval
from ..data.text import read_text
from ..errors import BitpressError, ConfigError
from ..formats import open_quantized
from ..hub.download import Source, resolve
from ..storage import files, journal
from ..storage.checkpoint import Checkpoint
from ..storage.fingerprint import Fingerprint, digest, stage
from . import process
from .conditions import Conditions
from .metrics import METRICS
from .process import PREDICTIONS, Say, Subject
from .results import identity_of, origin_of_external


def evaluate_external(
    source: Source,
    baseline: Source | None,
    conditions: Conditions,
    folder: Path,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """The metrics of a checkpoint; metrics.json, report.md and report.html are in `folder` then. Called again, it reads
    what is there, or goes on where it was interrupted.

    Args:
        baseline: the unquantized model; None for the checkpoint itself, or where it is not known.
    Raises:
        ConfigError: the folder holds figures of other files.
    """
    process.require_lm_eval(conditions.settings)
    source.check_output(folder)
    baseline = None if baseline and source.folder.resolve() == baseline.folder.resolve() else baseline
    model = baseline or source
    path = model.folder.resolve()
    config = {  # as much of a run's config as there is
        "models": [{"id": str(path) if model.id == path.name else model.id, "revision": model.revision}],
        "eval": conditions.settings.model_dump(mode="json"),
        "device": conditions.device,
    }
    subject = Subject(
        model=model,
        checkpoint=source.folder,
        baseline=baseline.folder if baseline else None,
        origin=origin_of_external(source, baseline, config),
        artifact=_artifact(source, baseline),
        predictions=(folder / PREDICTIONS, _artifact(model, None)),
    )
    seen = {source: open_quantized(source.folder)} | ({baseline: Checkpoint(baseline.folder)} if baseline else {})
    for each, checkpoint in seen.items():
        if sentence := checkpoint.dequantization:
            say(f"{each.id}: {sentence}")
    for remark in Checkpoint(source.folder).remarks:
        say(remark)
    files.make_folder(folder)
    with journal.locked(folder):
        metrics = process.evaluate(subject, conditions, folder, say)
        process.remove_partial(folder / PREDICTIONS)
        return metrics


def _artifact(source: Source, baseline: Source | None) -> Fingerprint:
    """What tells the files of a checkpoint, and of its baseline, from others."""
    fields: Fingerprint = {}
    for role, model in (("checkpoint", source), ("baseline", baseline)):
        if model:
            identity = Checkpoint(model.folder).identity()
            fields |= {f"artifact.{role}.{name}": value for name, value in {**model.to_dict(), **identity}.items()}
    return fields


def measure_like(
    runs: Sequence[dict[str, Any]], checkpoints: Sequence[Path], folder: Path, command: str, say: Say
) -> list[Path]:
    """Evaluate checkpoints as the runs beside which they are to stand were: against their model, by their settings.

    Args:
        runs: metrics.json of each.
        folder: each checkpoint gets a folder of its own in it, named after all that its quality depends on.
    Returns:
        The metrics.json of each checkpoint.
    Raises:
        ConfigError: the runs are not of one model, or it or their text is not there any more.
    """
    advice = (
        f"`bitpress eval {checkpoints[0]} --baseline MODEL -o DIR` measures it by itself, and DIR compares like a run"
    )
    if len({_identity(run) for run in runs}) != 1:
        raise ConfigError(
            f"{checkpoints[0]} is no run, and to be measured like one it takes runs of one model; {advice}"
        )
    try:
        baseline, conditions = _conditions_of(runs[0], command)
    except BitpressError as error:
        raise ConfigError(f"{checkpoints[0]} cannot be measured like the runs: {error}; {advice}") from error
    measured = []
    for checkpoint in checkpoints:
        source = resolve(str(checkpoint))
        now = conditions.fingerprint(_artifact(source, baseline))
        own = folder / f"{source.id}-{digest([stage(now, 'artifact'), stage(now, 'quality')])[:8]}"
        if not (own / METRICS).exists():
            say(f"{checkpoint}: measured like the runs, against {baseline.id}")
        evaluate_external(source, baseline, conditions, own)
        measured.append(own / METRICS)
    return measured


def _identity(run: dict[str, Any]) -> str:
    model = run["model"]
    return model.get("identity") or json.dumps([model["id"], model.get("revision")])


def _conditions_of(run: dict[str, Any], command: str) -> tuple[Source, Conditions]:
    """A run's model, and how the run was evaluated."""
    config, model = run.get("config") or {}, run["model"]
    settings: Eval = load_eval({**config.get("eval", {}), "dtype": run["protocol"].get("dtype") or "auto"})
    text = read_text(settings.text)
    if text.sha256 != run["protocol"].get("text_sha256"):
        raise ConfigError(f"the text {settings.text} is not what they read")
    conditions = Conditions.make(settings, config.get("device", "auto"), text, command)
    for entry in config.get("models", []):
        folder = Path(entry["id"]).expanduser().resolve()  # of a local model, only its name is the model's id
        if entry["id"] == model["id"] or (folder.name == model["id"] and folder.is_dir()):
            source = resolve(entry["id"], model.get("revision"))
            if model.get("identity") in (None, identity_of(Checkpoint(source.folder))):
                return source, conditions
    raise ConfigError(f"their model {model['id']} is not where it was")
