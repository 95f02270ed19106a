"""Runs a config: every model by every recipe, each pair a job; what is done and verified is skipped."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitpress.eval.report import results

from ..config.load import calibration_of
from ..config.schema import BASELINE, Model, Publish, Run
from ..data.calibration import Calibration, calibrate
from ..data.text import read_text
from ..errors import BitpressError
from ..evaluate import process
from ..evaluate.conditions import Conditions
from ..evaluate.metrics import METRICS, read_metrics
from ..evaluate.process import Say
from ..evaluate.results import RESULTS, write_report
from ..evaluate.windows import windows
from ..hub.download import resolve
from ..models.pretrained import load_tokenizer
from ..models.structure import skeleton
from ..publish.upload import prepare, send
from ..quantize.block_runner import PROBE_TOKENS
from ..quantize.recipe import Recipe
from ..storage import files
from ..storage.artifacts import is_checkpoint
from ..storage.checkpoint import Checkpoint, read_json
from ..system.unexpected import unexpected
from ..trackers import trackers
from ..trackers.base import TrackedJob, Tracker
from .executors import executor
from .folders import jobs_of, model_folder, recipe_names, remote_folder, run_folder
from .job import Job, Outcome
from .plan import RunPlan, plan_run

__all__ = ["Outcome", "execute", "jobs_of", "plan_jobs", "run_folder", "summarize"]
TRACKED = "tracked.json"  # tracker -> seal of the metrics that it has


def execute(
    run: Run,
    command: str,
    say: Say,
    override: bool = False,
    redo: str | None = None,
    plan: RunPlan | None = None,
) -> list[Outcome]:
    """The outcome of every job of a config, in the config's order; one that fails does not stop the others.

    Args:
        command: what the user typed, for the report.
        say: takes a line of news.
        override: missed gates are recorded as overridden, and are no error.
        redo: the stage to do again, with what comes after: "quantize", or "evaluate", which keeps artifacts.
        plan: of this config; by default it is made here.
    Raises:
        ConfigError: there is no such executor, or something that a job needs is not here: a package, memory. DiskError:
            there is no room for all of them. No job has started then.
    """
    carries_out, keepers = executor(run.executor, run.executor_options), trackers(run.track)
    remote = remote_folder(run)
    if remote and (count := remote.fetch()):
        say(f"{count} files of earlier work came from {remote.url}")
    plan = plan or plan_run(run, jobs_of(run))
    plan.check()
    planned_jobs = {job.folder: job for job in plan.jobs}
    outcomes: dict[Path, Outcome] = {}

    def jobs() -> Iterator[Job]:
        """One model's jobs after another's: nothing of a model is fetched before its turn."""
        for model in run.models:
            reason, planned = None, list[Job]()
            try:
                planned = plan_jobs(run, model, command, override, redo)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # as in run_job: one model that cannot be prepared stops no other
                reason = unexpected(error, run_folder(run))
            if reason:
                for name in recipe_names(run):
                    folder = model_folder(run, model) / name
                    outcomes[folder] = Outcome(model.id, name, folder, error=reason)
            for job in planned:
                own = planned_jobs.get(job.folder)
                yield replace(job, memory=max(own.memory.values(), default=0), searches=own.search) if own else job

    for outcome in carries_out.map(jobs(), say):
        outcomes[outcome.folder] = outcome
        if remote and (count := remote.send()):
            say(f"{outcome.model}  {outcome.recipe}  {count} files sent to {remote.url}")
    for model in run.models:
        folder = model_folder(run, model)
        if all(outcomes[folder / name].metrics for name in recipe_names(run)):
            process.remove_partial(folder / process.PREDICTIONS)
    ordered = [outcomes[model_folder(run, model) / name] for model in run.models for name in recipe_names(run)]
    ordered = [_track(run, keepers, outcome, say) for outcome in ordered] if keepers else ordered
    return [_publish(run.publish, outcome, override, say) for outcome in ordered] if run.publish else ordered


def plan_jobs(run: Run, model: Model, command: str = "", override: bool = False, redo: str | None = None) -> list[Job]:
    """The jobs of one model, the baseline's first.

    Raises:
        BitpressError: everything that can be refused before a weight is read.
    """
    process.require_lm_eval(run.eval)
    text = read_text(run.eval.text)
    recipes = {settings.label: Recipe.make(settings, run.device) for settings in run.recipes if not settings.baseline}
    source = resolve(model.id, model.revision)
    parent = model_folder(run, model)
    source.check_output(parent)
    checkpoint = Checkpoint(source.folder)
    tokenizer = load_tokenizer(source.folder)
    config = skeleton(checkpoint).config
    first = windows(text, tokenizer, run.eval, config).windows[0]
    conditions = Conditions.make(run.eval, run.device, text, command, redo is not None)
    baseline = Job(
        run=run,
        model=model.id,
        source=source,
        name=BASELINE,
        recipe=None,
        calibration=None,
        conditions=conditions,
        probe=tuple(first.ids[:PROBE_TOKENS].tolist()),
        folder=parent / BASELINE,
        override=override,
        redo=redo == "quantize",
    )
    jobs, calibrations = [baseline], dict[str, Calibration]()
    for settings in run.recipes:
        if settings.baseline:
            continue
        calibration = None
        if recipes[settings.label].calibrated:
            wanted = calibration_of(settings)
            if (key := wanted.model_dump_json()) not in calibrations:
                calibrations[key] = calibrate(wanted, tokenizer, config)
            calibration = calibrations[key]
        folder = parent / settings.label
        jobs.append(replace(baseline, name=settings.label, recipe=settings, calibration=calibration, folder=folder))
    for number, job in enumerate(jobs):
        alike = [other for other in jobs if other.calibration is job.calibration]
        jobs[number] = replace(job, shares=(job.calibration is not None and len(alike) > 1) or _budgeted(job))
    return jobs


def _budgeted(job: Job) -> bool:
    """Whether a job has a budget, whose search later budgets of the same run take up."""
    return job.recipe is not None and job.recipe.budget is not None


def summarize(run: Run, outcomes: Sequence[Outcome]) -> Path | None:
    """The page of one report over all jobs that are finished, those of earlier calls among them; None where none is.

    Jobs that were refused or failed are listed on it with the reason.
    """
    finished = []
    refused = [(o.model, o.recipe, str(o.error)) for o in outcomes if o.error and not o.metrics]
    for model in run.models:
        for path in sorted(model_folder(run, model).glob(f"*/{METRICS}")):
            if is_checkpoint(path.parent):  # no run's folder holds weights: whose figures these are nobody knows
                continue
            try:
                metrics = read_metrics(path)
            except BitpressError as error:
                if (model.id, path.parent.name) not in {reason[:2] for reason in refused}:
                    refused.append((model.id, path.parent.name, str(error)))
                continue
            if metrics.get("checkpoint") is None:  # an external one, which happens to lie there, is not the run's
                finished.append(metrics)
    page = write_report(run_folder(run), finished, refused) if finished else None
    if remote := remote_folder(run):
        remote.send()
    return page


def _track(run: Run, keepers: Sequence[Tracker], outcome: Outcome, say: Say) -> Outcome:
    """The outcome, sent to each tracker that does not have these figures yet; a receipt in the job's folder says which
    has."""
    if outcome.metrics is None:
        return outcome
    receipt, seal = outcome.folder / TRACKED, outcome.metrics.get("seal")
    sent: dict[str, Any] = read_json(receipt) if receipt.exists() else {}
    for keeper in keepers:
        if sent.get(keeper.name) == seal:
            continue
        numbers, texts = results.figures(results.rows([outcome.metrics])[0])
        reports = [outcome.folder / name for name in (METRICS, RESULTS, "report.html")]
        job = TrackedJob(run.name, f"{outcome.model} {outcome.recipe}", texts, numbers, reports, run_folder(run))
        try:
            where = keeper.send(job)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a tracker or its server does, the run is finished
            reason = unexpected(error, outcome.folder)
            say(f"{outcome.model}  {outcome.recipe}  not sent to {keeper.name}: {reason}")
            outcome = replace(outcome, error=outcome.error or reason)
            continue
        say(f"{outcome.model}  {outcome.recipe}  sent to {keeper.name}: {where}")
        sent[keeper.name] = seal
        files.write_json(receipt, sent)
    return outcome


def _publish(where: Publish, outcome: Outcome, override: bool, say: Say) -> Outcome:
    """The outcome, and where it was published: what is finished and passed its gates goes to the Hub."""
    if outcome.error or outcome.recipe == BASELINE:
        return outcome
    try:
        upload = prepare(outcome.folder, where.name_of(outcome.model, outcome.recipe), override)
        publication = send(upload, where.private, where.collection)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        reason = unexpected(error, outcome.folder)
        say(f"{outcome.model}  {outcome.recipe}  not published: {reason}")
        return replace(outcome, error=reason)
    say(f"{outcome.model}  {outcome.recipe}  {publication.state}: {publication.url}")
    return replace(outcome, published=publication.url)
