"""What a config's jobs will take, and what is wanting before the first of them can start."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from bitpress.eval.report.words import size

from ..config.load import calibration_of
from ..config.schema import BASELINE, Model, RecipeSettings, Run
from ..data.text import needed_packages
from ..errors import BitpressError, ConfigError, DiskError, listing
from ..hub.download import local
from ..quantize.recipe import Recipe
from ..storage.checkpoint import Checkpoint
from ..storage.files import nearest_folder
from ..storage.fingerprint import MANIFEST
from ..storage.remote import local_output
from ..system import packages
from ..system.collector import collector_paused
from ..system.device import pick_device, pick_devices, total_memory
from ..system.remembered import remembered
from ..system.unexpected import unexpected
from ..trackers import trackers
from .executors import executor
from .folders import run_folder
from .job_plan import FINISHED, HALF_DONE, NOT_BEGUN, JobPlan
from .rates import Rates, measure

ASSUMPTIONS = (
    "parts run one after the other, on an otherwise idle machine",
    "a pass over tokens takes 2 floating-point operations for each weight and token; attention itself is left out",
    "layers wider than 2048 inputs are rounded at the rate of 2048, and in proportion longer by calibrated methods",
    "each window of a sliding protocol reads its whole context",
    "texts have a token for every 4 characters, where no number of windows is given",
    "weights and inputs go from one GPU to another in no time, where `gpus` are several",
)


NODE_ASSUMPTIONS = (
    "all nodes are alike, and each runs one job at a time",
    "a model's baseline ends before its recipes begin, and budgets that share a search run one after the other",
    "a pass of the unquantized model that recipes share is counted once, for the first of them, and waited for by none",
    "what is sent or downloaded takes no time",
)


@dataclass(frozen=True)
class Schedule:
    """What the jobs of a config take on several machines, as `executor: ray` hands them out.

    seconds: until the last one ends. serial: one after the other, on one machine. busy: of all machines' time, the
    share in which they work. last: model and recipe of the job that ends last.
    """

    nodes: int
    seconds: float
    serial: float
    busy: float
    last: str


def simulate(jobs: Sequence[JobPlan], rates: Rates, nodes: int) -> Schedule | None:
    """When the jobs would end on so many machines; None where the time of some job is not known.

    The first job that waits for no other goes to a machine as soon as one is free.
    """
    possible = [job for job in jobs if not job.problem]
    known = [job.seconds(rates) for job in possible]
    seconds = [each for each in known if each is not None]
    if not seconds or len(seconds) < len(known):
        return None
    waiting, running, now = list(range(len(possible))), list[tuple[float, int]](), 0.0
    last = waiting[0]

    def blocked(number: int) -> bool:
        job, unfinished = possible[number], [*waiting, *(other for _, other in running)]
        earlier = [possible[n] for n in unfinished if n < number and possible[n].folder.parent == job.folder.parent]
        return any(other.recipe == BASELINE or (other.search and job.search) for other in earlier)

    while waiting or running:
        while len(running) < nodes and (ready := [number for number in waiting if not blocked(number)]):
            waiting.remove(ready[0])
            running.append((now + seconds[ready[0]], ready[0]))
        now, last = min(running)
        running.remove((now, last))
    serial = sum(seconds)
    busy = serial / (nodes * now) if now else 0.0
    return Schedule(nodes, now, serial, busy, f"{possible[last].model}  {possible[last].recipe}")


@dataclass(frozen=True)
class RunPlan:
    """The plan of a config: jobs in its order, and what it takes that is not here.

    missing: a sentence for each package that is wanted and not installed, with those who want it.
    absent: models whose files are not on this machine, so that nothing is known of their jobs.
    """

    run: Run
    jobs: list[JobPlan]
    missing: list[str]
    absent: list[str]

    @property
    def device(self) -> torch.device:
        return pick_device(self.run.device)

    @property
    def folder(self) -> Path:
        """The folder of the run, with its report."""
        return run_folder(self.run)

    def to_dict(self, rates: Rates, nodes: int | None = None) -> dict[str, Any]:
        """The plan in plain values, its times by these rates; with `nodes`, also on so many machines."""
        schedule = simulate(self.jobs, rates, nodes) if nodes else None
        return {
            **({"nodes": vars(schedule), "node_assumptions": list(NODE_ASSUMPTIONS)} if schedule else {}),
            "run": self.run.name,
            "folder": str(self.folder),
            "jobs": [job.to_dict(rates) for job in self.jobs],
            "absent": self.absent,
            "problems": [str(fault) for fault in self.problems()],
            "rates": {key: value for key, value in vars(rates).items() if key != "rounding"}
            | {"rounding": dict(rates.rounding)},
            "assumptions": list(ASSUMPTIONS),
        }

    def problems(self) -> list[BitpressError]:
        """Everything that is wanting before the first job can start: packages, memory, disk."""
        faults: list[BitpressError] = [ConfigError(sentence) for sentence in self.missing]
        total = total_memory(self.device)
        elsewhere = executor(self.run.executor, self.run.executor_options).elsewhere
        try:
            pick_devices(self.run.device, 1 if elsewhere else self.run.gpus)
        except ConfigError as error:
            faults.append(error)
        for job in () if elsewhere else self.jobs:
            if job.least > total:
                faults.append(
                    ConfigError(
                        f"{job.model}  {job.recipe}: needs at least {size(job.least)} of memory, this machine has "
                        f"{size(total)}; use another machine, or take the recipe out"
                    )
                )
        output = local_output(self.run.output).absolute()
        needed, free = sum(job.disk for job in self.jobs), psutil.disk_usage(str(nearest_folder(output))).free
        if needed > free:
            faults.append(
                DiskError(
                    f"{output}: all jobs together need about {size(needed)}, {size(free)} are free; free some space or "
                    "choose another output"
                )
            )
        return faults

    def check(self) -> None:
        """Refuse what cannot end well before any job starts.

        Raises:
            ConfigError, DiskError: everything that is wanting, at once.
        """
        if faults := self.problems():
            kind = type(faults[0]) if len({type(fault) for fault in faults}) == 1 else ConfigError
            sentences = [str(fault) for fault in faults]
            whole = sentences[0] if len(sentences) == 1 else f"this run cannot be done here:\n{listing(sentences)}"
            raise kind(whole)


def plan_run(run: Run, names: Sequence[tuple[Model, str, Path]]) -> RunPlan:
    """The plan of a config, from the headers of the models that are on this machine.

    Args:
        names: model, recipe's name and folder of every job, in the config's order.
    """
    wanted: dict[str, list[str]] = {}
    for source, key in [(run.eval.text, "eval.text"), *_calibration_texts(run)]:
        for package in needed_packages(source):
            wanted.setdefault(package, []).append(key)
    for package in executor(run.executor, run.executor_options).packages:
        wanted.setdefault(package, []).append(f"executor: {run.executor}")
    if run.eval.tasks:
        wanted.setdefault("lm-eval", []).append("eval.tasks")
    recipes = {settings.label: settings for settings in run.recipes if not settings.baseline}
    resolved: dict[str, Recipe] = {}
    for label, settings in recipes.items():
        resolved[label] = recipe = Recipe.make(settings, run.device)
        needs = [package for spec in recipe.specs() for package in spec.method.packages]
        needs += recipe.format.packages if recipe.format else ()
        for package in dict.fromkeys(needs):
            wanted.setdefault(package, []).append(label)
    missing = {package: reason for package in wanted if (reason := packages.unsupported(package))}
    jobs: list[JobPlan] = []
    absent: dict[str, None] = {}
    checkpoints: dict[Model, Checkpoint] = {}
    for model, name, folder in names:
        job = JobPlan(model.id, name, folder, _state(folder, name == BASELINE))
        try:
            if model not in checkpoints:
                if (source := local(model.id, model.revision)) is None:
                    absent[model.id] = None
                    continue
                checkpoints[model] = Checkpoint(source.folder)
            if name == BASELINE:
                jobs.append(_estimated(job, run, checkpoints[model]))
            elif lacking := [reason for package, reason in missing.items() if name in wanted[package]]:
                jobs.append(replace(job, problem="; ".join(lacking)))
            else:
                jobs.append(_estimated(job, run, checkpoints[model], resolved[name], recipes[name]))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the job itself will say so; others are not to blame
            jobs.append(replace(job, problem=str(unexpected(error))))
    jobs = _shared_passes(_shared_searches(jobs, recipes), recipes)
    sentences = [f"{', '.join(dict.fromkeys(wanted[package]))}: {reason}" for package, reason in missing.items()]
    try:
        trackers(run.track)
    except ConfigError as error:
        sentences.append(str(error))
    return RunPlan(run, jobs, sentences, list(absent))


def _estimated(
    job: JobPlan,
    run: Run,
    checkpoint: Checkpoint,
    recipe: Recipe | None = None,
    settings: RecipeSettings | None = None,
) -> JobPlan:
    """A job with what it will take; what was estimated for the same job on the same files before is remembered.

    Args:
        recipe, settings: None for the baseline.
    """

    def estimates() -> dict[str, Any]:
        with collector_paused():
            from . import estimate

        if recipe is None or settings is None:
            return estimate.baseline(job, run, checkpoint).estimates()
        return estimate.quantized(job, run, checkpoint, recipe, settings).estimates()

    text = run.eval.text
    read = Path(text).stat() if isinstance(text, str) and os.path.isfile(text) else None
    key = {
        "files": checkpoint.model_identity(),
        "sizes": [(path.name, path.stat().st_size) for path in checkpoint.other_files()],
        "state": [job.state, (job.folder / "artifact" / MANIFEST).exists()],
        "recipe": settings.model_dump(mode="json") if settings else None,
        "eval": run.eval.model_dump(mode="json"),
        "text": [read.st_size, read.st_mtime_ns] if read else None,
        "device": [run.device, str(pick_device(run.device)), total_memory(pick_device(run.device)), run.gpus],
        "threads": torch.get_num_threads(),  # on which the memory depends
    }
    plain = remembered("plan", key, estimates, keep=lambda answer: answer["problem"] is None)
    return job.with_estimates(plain, recipe.specs() if recipe else ())


def _shared_searches(jobs: list[JobPlan], recipes: Mapping[str, RecipeSettings]) -> list[JobPlan]:
    """The jobs, of which budgets that differ in their size alone search once, in the first one."""
    seen: set[tuple[Path, str]] = set()
    result = []
    for job in jobs:
        if "search" in job.work:
            settings = recipes[job.recipe].model_copy(update={"budget": None, "name": None, "sequential": True})
            if (key := (job.folder.parent, settings.model_dump_json())) in seen:
                job = replace(job, work={stage: work for stage, work in job.work.items() if stage != "search"})
            seen.add(key)
        result.append(job)
    return result


def _shared_passes(jobs: list[JobPlan], recipes: Mapping[str, RecipeSettings]) -> list[JobPlan]:
    """The jobs, of which those that learn the same of the unquantized model gather it once, in the first one."""
    seen: set[tuple[Path, str]] = set()
    result = []
    for job in jobs:
        own = job.work.get("quantize")
        if own and job.gathering:
            if (key := (job.folder.parent, calibration_of(recipes[job.recipe]).model_dump_json())) in seen:
                less = replace(own, products=max(0.0, own.products - job.gathering), statistics=0.0)
                job = replace(job, work=job.work | {"quantize": less})
            seen.add(key)
        result.append(job)
    return result


def measure_rates(plans: Sequence[RunPlan]) -> Rates:
    """The rates of this machine for the jobs of these plans, measured in about ten seconds."""
    layers = {spec.name: (spec, shape) for plan in plans for job in plan.jobs for spec, shape in job.layers}
    return measure(list(layers.values()), torch.bfloat16, plans[0].device, plans[0].folder)


def _calibration_texts(run: Run) -> Iterator[tuple[Any, str]]:
    """The texts that recipes learn from, each with the recipe's name."""
    for settings in run.recipes:
        if not settings.baseline and Recipe.make(settings, run.device).calibrated:
            yield calibration_of(settings).text, settings.label


def _state(folder: Path, baseline: bool) -> str:
    """How far a job was taken by earlier calls, as far as its folder tells without reading a weight."""
    if not folder.is_dir():
        return NOT_BEGUN
    finished = (folder / "metrics.json").exists() and (baseline or (folder / "artifact" / MANIFEST).exists())
    return FINISHED if finished else HALF_DONE if any(folder.iterdir()) else NOT_BEGUN
