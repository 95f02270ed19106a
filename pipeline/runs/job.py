"""One job of a run: a model, quantized by a recipe, saved, reloaded, evaluated, reported and judged."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.doctor import remember_headers
from ..config.schema import BASELINE, RecipeSettings, Run
from ..data.calibration import Calibration
from ..errors import BitpressError, GateError
from ..evaluate import gates, process
from ..evaluate.conditions import Conditions
from ..evaluate.metrics import METRICS
from ..evaluate.process import Say
from ..evaluate.results import origin_of_run
from ..evaluate.verify import verify_artifact
from ..hub.download import Source
from ..quantize.artifact import DISTILLED, UNFINISHED, quantize
from ..quantize.recipe import Recipe
from ..quantize.sequential import clear_states
from ..quantize.statistics import SHARED
from ..storage import files, journal
from ..storage.artifacts import ARTIFACT
from ..storage.checkpoint import Checkpoint
from ..storage.fingerprint import MANIFEST, RECORD
from ..system.progress import progress
from ..system.unexpected import unexpected


@dataclass(frozen=True)
class Job:
    """One recipe on one model, in plain values, so that any process that sees the same files can run it.

    Attributes:
        run: the config. model: the id that the config has for the model. source: where its files are.
        name: the recipe's. recipe: its settings; None for the baseline.
        calibration: the tokens for it; None where no method of it is calibrated.
        conditions: how it is evaluated. probe: tokens that the reloaded model and the one in memory both read.
        folder: its own, beside those of the model's other jobs.
        override: gates that are missed are recorded as overridden, and are no error.
        redo: make the artifact again, whatever the one that is there was made from.
        patience: seconds that it waits for the lock of its folder; a worker that is lost may hold it for a while.
        shares: whether other jobs on the model may learn from the same statistics, or by the same search.
        memory: bytes at its peak, by the plan; 0 where nobody knows. searches: whether it takes part in the search that
            the budgets on one model share.
    """

    run: Run
    model: str
    source: Source
    name: str
    recipe: RecipeSettings | None
    calibration: Calibration | None
    conditions: Conditions
    probe: tuple[int, ...]
    folder: Path
    override: bool = False
    redo: bool = False
    patience: float = 0.0
    shares: bool = False
    memory: int = 0
    searches: bool = False


@dataclass(frozen=True)
class Outcome:
    """How one job ended: its metrics, or what stopped it, or both where it misses a gate."""

    model: str
    recipe: str
    folder: Path
    metrics: dict[str, Any] | None = None
    error: BitpressError | None = None
    published: str | None = None  # where on the Hub

    @property
    def artifact(self) -> Path | None:
        """The quantized checkpoint's folder; None for the baseline, and where there is none yet."""
        folder = self.folder / ARTIFACT
        return folder if self.recipe != BASELINE and (folder / MANIFEST).exists() else None


def run_job(job: Job, say: Say) -> Outcome:
    """The outcome of a job, whatever happens: a job that fails does not stop the others.

    Args:
        say: takes a line of news.
    """
    outcome = Outcome(job.model, job.name, job.folder)
    say(f"{job.model}  {job.name}")
    try:
        files.make_folder(job.folder)
        with journal.locked(job.folder, job.patience):
            metrics = _metrics(job, lambda line: say(f"  {line}"))
            missed = _judge(job, metrics, lambda line: say(f"  {line}"))
        return replace(outcome, metrics=metrics, error=missed)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a library throws at one model's files: other jobs are not to blame
        reason = unexpected(error, job.folder)
        say(f"  failed: {reason}")
        return replace(outcome, error=reason)


def _metrics(job: Job, say: Say) -> dict[str, Any]:
    """The metrics of a job, whose stages are done as far as they are not done already."""
    checkpoint = Checkpoint(job.source.folder)
    baseline = {f"artifact.files.{name}": value for name, value in checkpoint.identity().items()}
    beside = job.folder.parent
    predictions = (beside / process.PREDICTIONS, baseline)
    if job.recipe is None:
        if checkpoint.dequantization:
            say(checkpoint.dequantization)
        subject = process.Subject(
            model=job.source,
            checkpoint=job.source.folder,
            baseline=None,
            origin=origin_of_run(job.run, job.source, None, job.folder),
            artifact=baseline,
            predictions=predictions,
            dequantize=True,
        )
        return process.evaluate(subject, job.conditions, job.folder, say)
    recipe = replace(Recipe.make(job.recipe, job.run.device, job.run.gpus), calibration=job.calibration)
    artifact = job.folder / ARTIFACT
    if job.redo:
        _remove_work(job.folder)
    start = time.perf_counter()
    by = f" by {recipe.method}" if recipe.method else " the key-value cache alone"
    say(f"quantize{by}{f', calibrated on {recipe.calibration}' if recipe.calibration else ''}")
    if recipe.calibration and recipe.calibration.name == job.conditions.text:
        say(f"{job.conditions.text} is also what is measured, so the figures will flatter: give eval.text another text")
    shared = beside / SHARED if job.shares else None
    with progress("quantizing") as step:
        notes = quantize(checkpoint, job.source.to_dict(), recipe, artifact, job.folder, step, shared)
    remember_headers(artifact)
    for note in notes:
        say(note)
    seconds = {"quantize": time.perf_counter() - start}
    subject = process.Subject(
        model=job.source,
        checkpoint=artifact,
        baseline=job.source.folder,
        origin=origin_of_run(job.run, job.source, recipe, job.folder),
        artifact={"artifact.sha256": files.sha256_file(artifact / MANIFEST)},
        predictions=predictions,
        verify=lambda: verify_artifact(
            checkpoint, recipe, artifact, torch.tensor(job.probe), job.run.device, job.conditions.settings.dtype
        ),
    )
    return process.evaluate(subject, job.conditions, job.folder, say, seconds, beside / BASELINE / METRICS)


def _remove_work(folder: Path) -> None:
    """Delete what a job made of its model, finished or not; the log of errors and a receipt of publishing stay."""
    for name in (ARTIFACT, UNFINISHED, DISTILLED):
        if (folder / name).is_dir():
            files.remove_folder(folder / name)
    clear_states(folder)
    for name in (METRICS, journal.NAME, RECORD):
        (folder / name).unlink(missing_ok=True)


def _judge(job: Job, metrics: dict[str, Any], say: Say) -> GateError | None:
    """What the metrics miss; the gates' verdict is recorded with them: gates may change without measuring again."""
    if job.recipe is None:
        return None
    verdict = gates.verdict(job.run.gates, metrics, job.override)
    missed = gates.missed(verdict["judged"]) if verdict else []
    if verdict != metrics["gates"]:
        metrics |= {"gates": verdict, "config": {**metrics["config"], "gates": job.run.gates.model_dump(mode="json")}}
        process.write_metrics(job.folder, metrics, job.folder.parent / BASELINE / METRICS)
    for sentence in missed:
        say(f"gate missed{' (overridden)' if job.override else ''}: {sentence}")
    return GateError("; ".join(missed)) if missed and not job.override else None
