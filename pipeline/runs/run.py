"""Runs a config: every model by every scheme, stage by stage, skipping what is done and verified."""

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config.load import load_calibration
from ..config.schema import Model, Publish, Run
from ..data.calibration import Calibration, calibrate
from ..data.text import Text, read_text
from ..errors import BitpressError, GateError
from ..evaluate import gates, process, results, verify
from ..evaluate.measure import Resume
from ..evaluate.results import BASELINE
from ..evaluate.windows import windows
from ..hub.download import Source, resolve
from ..models.loading import load_tokenizer
from ..models.structure import skeleton
from ..publish.upload import prepare, send
from ..quantize.artifact import quantize
from ..quantize.recipe import Recipe
from ..storage import files as store
from ..storage import journal
from ..storage.checkpoint import Checkpoint, read_json
from ..storage.fingerprint import MANIFEST, check_fingerprint
from ..system.progress import progress
from ..system.redact import redact

_UNFINISHED = "evaluation.partial"  # windows that are evaluated, until all are
_PREDICTIONS = "predictions.partial"  # of the baseline, until all jobs of its model are done
Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """How one job ended: its metrics, or what stopped it."""

    model: str
    scheme: str
    folder: Path
    metrics: dict[str, Any] | None = None
    error: BitpressError | None = None
    published: str | None = None  # where on the Hub


@dataclass(frozen=True)
class _Input:
    """What all jobs on one model share. recipes: by scheme, the baseline's left out."""

    source: Source
    checkpoint: Checkpoint
    text: Text
    probe: Tensor
    recipes: dict[str, Recipe]


def execute(run: Run, command: str, say: Say, override: bool = False) -> list[Outcome]:
    """Every job of a config; a failed one does not stop the others.

    Args:
        command: what the user typed, for the report.
        say: takes a line of news.
        override: missed gates are recorded as overridden, and no error.
    """
    outcomes: list[Outcome] = []
    for model in run.models:
        folder = _model_folder(run, model)
        schemes = [BASELINE, *(recipe.label for recipe in run.recipes if not recipe.baseline)]
        try:
            given = _prepare(run, model)
        except BitpressError as error:
            outcomes += [Outcome(model.id, scheme, folder / scheme, error=error) for scheme in schemes]
            continue
        for scheme in schemes:
            say(f"{model.id}  {scheme}")
            outcome = Outcome(model.id, scheme, folder / scheme)
            try:
                metrics = _job(run, given, scheme, folder, command, lambda line: say(f"  {line}"))
                missed = _pass(run, metrics, folder / scheme, override, lambda line: say(f"  {line}"))
                outcome = Outcome(model.id, scheme, folder / scheme, metrics, missed)
            except BitpressError as error:
                outcome = Outcome(model.id, scheme, folder / scheme, error=error)
                say(f"  failed: {error}")
            except Exception as error:  # a bug, or want of memory: the other jobs are not to blame
                outcome = Outcome(model.id, scheme, folder / scheme, error=_unexpected(error))
                say(traceback.format_exc())
            outcomes.append(outcome)
        if all(outcome.metrics for outcome in outcomes if outcome.model == model.id):
            process.forget(folder / _PREDICTIONS)
    return [_publish(run.publish, outcome, override, say) for outcome in outcomes] if run.publish else outcomes


def _unexpected(error: Exception) -> BitpressError:
    return BitpressError(f"unexpected {type(error).__name__}: {redact(str(error))}; please report it")


def _publish(where: Publish, outcome: Outcome, override: bool, say: Say) -> Outcome:
    """What is done and passed its gates goes to the Hub."""
    if outcome.error or outcome.scheme == BASELINE:
        return outcome
    try:
        shipment = prepare(outcome.folder, where.name_of(outcome.model, outcome.scheme), override)
        found = send(shipment, where.private, where.collection)
    except BitpressError as error:
        say(f"{outcome.model}  {outcome.scheme}  not published: {error}")
        return replace(outcome, error=error)
    except Exception as error:
        say(redact(traceback.format_exc()))
        return replace(outcome, error=_unexpected(error))
    say(f"{outcome.model}  {outcome.scheme}  {found.state}: {found.url}")
    return replace(outcome, published=found.url)


def summarize(run: Run, outcomes: list[Outcome]) -> Path | None:
    """One report over all jobs that finished; None if none did."""
    finished = [outcome.metrics for outcome in outcomes if outcome.metrics]
    return results.write_report(Path(run.output) / run.name, finished) if finished else None


def _model_folder(run: Run, model: Model) -> Path:
    folder = Path(run.output).expanduser() / run.name
    if len(run.models) == 1:
        return folder
    slug = "".join(c if c.isalnum() or c in "._-" else "--" for c in model.id.strip("/.~"))
    return folder / (f"{slug}@{model.revision}" if model.revision else slug)


def _prepare(run: Run, model: Model) -> _Input:
    """Everything that can be refused before a weight is read."""
    process.check_tasks(run.eval)
    text = read_text(run.eval.text)
    recipes = {each.label: Recipe.make(each, run.device) for each in run.recipes if not each.baseline}
    source = resolve(model.id, model.revision)
    source.check_output(_model_folder(run, model))
    checkpoint = Checkpoint(source.folder)
    tokenizer = load_tokenizer(source.folder)
    config = skeleton(checkpoint).config
    plan = windows(text, tokenizer, run.eval, config)
    calibrations: dict[str, Calibration] = {}
    for each in run.recipes:
        if not each.baseline and recipes[each.label].calibrated:
            settings = each.calibration or load_calibration({})
            if (key := settings.model_dump_json()) not in calibrations:
                calibrations[key] = calibrate(settings, tokenizer, config)
            recipes[each.label] = replace(recipes[each.label], calibration=calibrations[key])
    return _Input(source, checkpoint, text, plan.windows[0].ids[: verify.PROBE_TOKENS], recipes)


def _job(run: Run, given: _Input, scheme: str, parent: Path, command: str, say: Say) -> dict[str, Any]:
    """One scheme on one model: quantize, check, measure, report; returns the metrics."""
    folder = parent / scheme
    store.make_folder(folder)
    recipe = given.recipes.get(scheme)
    with journal.locked(folder):
        seconds: dict[str, float] = {}
        if recipe:
            seconds["quantize"] = _quantize(given, recipe, folder, say)
        path = folder / "metrics.json"
        marks = _marks(run, given, folder / "artifact" if recipe else None)
        if path.exists():
            check_fingerprint(path, marks)
            say("measured before")
            return read_json(path)
        measured: dict[str, Any] = {"check": None, "fingerprint": marks, "command": command}
        if recipe:
            say("reload in a fresh process, compared with the model in memory")
            how: dict[str, str] = {"device": run.device, "dtype": run.eval.dtype}
            measured["check"] = verify.check(given.checkpoint, recipe, folder / "artifact", given.probe, how)
        say("measure in a fresh process")
        artifact = folder / "artifact" if recipe else given.source.folder
        baseline = given.source.folder if recipe else None
        resume = Resume(*_place(folder / _UNFINISHED, marks), *_place(parent / _PREDICTIONS, _marks(run, given)))
        measured |= process.measure(artifact, baseline, run.eval, run.device, folder, resume)
        measured["seconds"] = seconds | {"evaluate": measured["seconds"]}
        made = results.made_here(run, given.source, recipe, folder)
        metrics = results.assemble(given.source, given.text, made, measured)
        results.write_report(folder, _with_baseline(parent, metrics))
        store.write_json(path, metrics)
        process.forget(folder / _UNFINISHED)
        return metrics


def _place(folder: Path, marks: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return str(folder.resolve()), marks


def _pass(run: Run, metrics: dict[str, Any], folder: Path, override: bool, say: Say) -> GateError | None:
    """The gates' verdict, recorded with the measurements: gates may change without measuring again."""
    if metrics["scheme"] == BASELINE:
        return None
    verdict = gates.verdict(run.gates, metrics, override)
    missed = gates.missed(verdict["judged"]) if verdict else []
    if verdict != metrics["gates"]:
        with journal.locked(folder):
            metrics |= {"gates": verdict, "config": {**metrics["config"], "gates": run.gates.model_dump(mode="json")}}
            results.write_report(folder, _with_baseline(folder.parent, metrics))
            store.write_json(folder / "metrics.json", metrics)
    for sentence in missed:
        say(f"gate missed{' (overridden)' if override else ''}: {sentence}")
    return GateError("; ".join(missed)) if missed and not override else None


def _with_baseline(parent: Path, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    path = parent / BASELINE / "metrics.json"
    if metrics["scheme"] == BASELINE or not path.exists():
        return [metrics]
    return [read_json(path), metrics]


def _quantize(given: _Input, recipe: Recipe, folder: Path, say: Say) -> float:
    start = time.perf_counter()
    learned = f", calibrated on {recipe.calibration}" if recipe.calibration else ""
    say(f"quantize by {recipe.method}{learned}")
    if recipe.calibration and recipe.calibration.name == given.text.name:
        say(f"{given.text.name} is also what is measured, so the figures will flatter: give eval.text another text")
    with progress("quantizing") as step:
        notes = quantize(given.checkpoint, given.source.to_dict(), recipe, folder / "artifact", folder, step)
    for note in notes:
        say(note)
    return time.perf_counter() - start


def _marks(run: Run, given: _Input, artifact: Path | None = None) -> dict[str, Any]:
    """Everything that measurements depend on; of the baseline, where there is no artifact."""
    files = {f"files.{name}": value for name, value in given.checkpoint.identity().items()}
    if artifact:
        files = {"artifact.sha256": store.sha256_file(artifact / MANIFEST)}
    return process.marks(run.eval, run.device, given.text, files)
