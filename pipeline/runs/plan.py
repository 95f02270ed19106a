"""What a config's jobs will take, from headers alone: files, bytes, memory, disk, time, and who will load the result.

Figures of memory and time are estimates. Each is a sum of parts that are written down here, with what was left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch

from bitpress.eval.measure import speed, stored_predictions
from bitpress.eval.measure.protocols import CONTEXTS
from bitpress.eval.report.words import size
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.registry import AUTOMATIC, select

from ..checkpoints.facts import facts_of
from ..checkpoints.runtimes import verdicts
from ..config.load import calibration_of
from ..config.schema import BASELINE, Eval, Model, RecipeSettings, Run
from ..data.text import needed_packages, read_text
from ..data.tokens import longest
from ..errors import BitpressError, ConfigError, DiskError, listing
from ..hub.download import local
from ..models.structure import TensorNames, skeleton
from ..quantize.block_runner import BATCH_TOKENS
from ..quantize.budget import PROBE_TOKENS, BudgetUnit, plan_search
from ..quantize.plan import Plan, make_plan
from ..quantize.recipe import Recipe
from ..quantize.spec import LayerSpec
from ..storage.checkpoint import INDEX, Checkpoint
from ..storage.files import nearest_folder
from ..storage.fingerprint import MANIFEST
from ..system import packages
from ..system.device import pick_device
from ..system.unexpected import unexpected
from ..trackers import trackers
from .executors import executor
from .rates import Rates, Shape, measure

NOT_BEGUN, HALF_DONE, FINISHED = "to do", "half done", "finished"
# Bytes of a process that has imported torch and transformers: 400 to 450 MB on Linux with the CPU build of torch 2.13.
_PROCESS = 450 << 20
_BATCHES_AT_A_TIME = 4
_CHARACTERS = 4  # of text for a token, about; what is measured is the text's length
_LINE, _FEW = 400, 2000  # bytes that index and manifest have for each layer, and besides
_LEARNED = 24  # bytes for each weight of a block that a method learns: float32 copies, gradients, two moments of Adam
_LOGITS = 16  # bytes for each logit while two models are compared: both, in float32, and what they are turned into


@dataclass(frozen=True)
class Work:
    """What a stage does, in the units of Rates.

    products: floating-point operations. statistics: multiplications of inputs by inputs. read, written, moved: bytes,
    the last from memory. rounded: spec's name -> its spec and how many weights. starts: of fresh processes.
    """

    products: float = 0.0
    statistics: float = 0.0
    read: float = 0.0
    written: float = 0.0
    moved: float = 0.0
    rounded: dict[str, tuple[LayerSpec, float]] = field(default_factory=dict)
    starts: int = 0

    def seconds(self, rates: Rates) -> float:
        """What it takes on a machine, one part after the other."""
        rounding = sum(weights / rates.weights_per_second(spec) for spec, weights in self.rounded.values())
        return (
            self.products / rates.products
            + self.statistics / rates.statistics
            + self.read / rates.read
            + self.written / rates.write
            + self.moved / rates.memory
            + self.starts * rates.start
            + rounding
        )


ASSUMPTIONS = (
    "parts run one after the other, on an otherwise idle machine",
    "a pass over tokens takes 2 floating-point operations for each weight and token; attention itself is left out",
    "layers wider than 2048 inputs are rounded at the rate of 2048, and in proportion longer by calibrated methods",
    "each window of a sliding protocol reads its whole context",
    "texts have a token for every 4 characters, where no number of windows is given",
)


@dataclass(frozen=True)
class JobPlan:
    """What one job will take.

    recipe: its name, BASELINE for the unquantized model. folder: of its own. state: NOT_BEGUN, HALF_DONE or FINISHED.
    problem: why it cannot be done; None if it can. Then the rest is empty.
    files: file of the artifact -> about how many bytes. format: of the artifact. weights: how many are quantized.
    memory: stage -> bytes at the peak, on the device that does the work. least: bytes without which it cannot run.
    disk: bytes that it adds to its folder at most. work: stage -> what it does; a stage that is done is left out.
    unknown: sentences on what no plan can tell. kept: reason -> names of tensors that stay as they are.
    runtimes: see checkpoints.runtimes.verdicts. notes: what the recipe left open and the plan decided.
    layers: for each spec its largest layer. search: whether it takes part in a search that budgets share.
    gathering: what of the work gathers statistics of the unquantized model, which other jobs may take up.
    """

    model: str
    recipe: str
    folder: Path
    state: str = NOT_BEGUN
    problem: str | None = None
    format: str | None = None
    files: dict[str, int] = field(default_factory=dict)
    weights: int = 0
    memory: dict[str, int] = field(default_factory=dict)
    least: int = 0
    disk: int = 0
    work: dict[str, Work] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    kept: dict[str, list[str]] = field(default_factory=dict)
    runtimes: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    layers: list[tuple[LayerSpec, Shape]] = field(default_factory=list)
    search: bool = False
    gathering: Work = Work()

    @property
    def nbytes(self) -> int:
        """The bytes of the artifact."""
        return sum(self.files.values())

    def seconds(self, rates: Rates) -> float | None:
        """What it takes on a machine; None where that cannot be told."""
        return None if self.problem or self.unknown else sum(work.seconds(rates) for work in self.work.values())

    def to_dict(self, rates: Rates) -> dict[str, Any]:
        """The plan in plain values."""
        plain = {
            key: value for key, value in vars(self).items() if key not in ("work", "layers", "folder", "gathering")
        }
        stages = {stage: work.seconds(rates) for stage, work in self.work.items()}
        return plain | {"folder": str(self.folder), "bytes": self.nbytes, "seconds": stages}


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
        return Path(self.run.output).expanduser() / self.run.name

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
        total = _memory(self.device)
        elsewhere = executor(self.run.executor, self.run.executor_options).elsewhere
        for job in () if elsewhere else self.jobs:
            if job.least > total:
                faults.append(
                    ConfigError(
                        f"{job.model}  {job.recipe}: needs at least {size(job.least)} of memory, this machine has "
                        f"{size(total)}; use another machine, or take the recipe out"
                    )
                )
        output = Path(self.run.output).expanduser().absolute()
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
                jobs.append(_baseline(job, run, checkpoints[model]))
            elif lacking := [reason for package, reason in missing.items() if name in wanted[package]]:
                jobs.append(replace(job, problem="; ".join(lacking)))
            else:
                jobs.append(_quantized(job, run, checkpoints[model], resolved[name], recipes[name]))
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


def _shared_searches(jobs: list[JobPlan], recipes: Mapping[str, RecipeSettings]) -> list[JobPlan]:
    """The jobs, of which budgets that differ in their size alone solve and probe once, in the first one."""
    seen: set[tuple[Path, str]] = set()
    result = []
    for job in jobs:
        if job.search and "quantize" in job.work:
            settings = recipes[job.recipe].model_copy(update={"budget": None, "name": None})
            if (key := (job.folder.parent, settings.model_dump_json())) in seen:
                own = job.work["quantize"]
                job = replace(job, work=job.work | {"quantize": Work(read=own.read, written=own.written)})
            seen.add(key)
        result.append(job)
    return result


def _shared_passes(jobs: list[JobPlan], recipes: Mapping[str, RecipeSettings]) -> list[JobPlan]:
    """The jobs, of which those that learn the same of the unquantized model gather it once, in the first one."""
    seen: set[tuple[Path, str]] = set()
    result = []
    for job in jobs:
        own = job.work.get("quantize")
        if own and job.gathering.products:
            if (key := (job.folder.parent, calibration_of(recipes[job.recipe]).model_dump_json())) in seen:
                products = max(0.0, own.products - job.gathering.products)
                job = replace(job, work=job.work | {"quantize": replace(own, products=products, statistics=0.0)})
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


def _memory(device: torch.device) -> int:
    """The bytes of memory of the device that models run on."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


@dataclass(frozen=True)
class _Evaluation:
    """What is read of the evaluation's text. tokens: None where its length is not known."""

    tokens: int | None
    context: int
    read: int  # tokens that go through the model, those that sliding windows read again among them
    why: str = ""

    @staticmethod
    def of(settings: Eval, config: Any) -> "_Evaluation":
        context = longest(config, settings.context or CONTEXTS[settings.protocol])
        windows = settings.windows
        if windows is None:
            if not isinstance(settings.text, str):
                name = settings.text.dataset
                why = f"how long the evaluation takes: {name} is not read here, and eval.windows gives no number"
                return _Evaluation(None, context, 0, why)
            windows = max(1, len(read_text(settings.text).content) // _CHARACTERS // context)
            if settings.protocol == "sliding":
                windows = windows * context // min(settings.stride, context)
        return _Evaluation(windows * context, context, windows * context)


def _evaluate(settings: Eval, dense: int, artifact: int, weights: int, text: _Evaluation, quantized: bool) -> Work:
    """The work of evaluating a model: loading, scoring, measuring speed.

    Args:
        dense, artifact: bytes of the baseline's weights, and of those that are measured. weights: how many a token
            is multiplied by.
    """
    tokens, moved, loads = float(text.read), 0.0, artifact
    if quantized:  # the baseline beside it, errors by depth, inputs rounded and not, and the proof of the reload
        tokens = 2 * tokens + 2 * text.context * (settings.output_errors + min(8, text.read / text.context / 10))
        loads = 3 * artifact + dense
    if settings.speed:
        lengths = settings.speed.prompt if isinstance(settings.speed.prompt, list) else [settings.speed.prompt]
        turns = settings.speed.repeats + 1  # one to warm up
        tokens += turns * sum(batch * length for batch in settings.speed.batch for length in lengths)
        moved = turns * len(settings.speed.batch) * len(lengths) * settings.speed.generate * float(artifact)
    return Work(products=2.0 * weights * tokens, read=loads, moved=moved, starts=2 if quantized else 1)


def _sizes(checkpoint: Checkpoint) -> tuple[int, int]:
    """The bytes of all tensors, and how many weights a token is multiplied by: matrices, all experts counted."""
    infos = checkpoint.tensors.values()
    return sum(info.nbytes for info in infos), sum(prod(info.shape) for info in infos if len(info.shape) > 1)


def _evaluation_memory(run: Run, dense: int, artifact: int, text: _Evaluation, config: Any) -> tuple[int, int]:
    """Bytes at the peak of an evaluation, and without the baseline beside the model, which may lie on the disk."""
    vocabulary = config.get_text_config().vocab_size
    alone = artifact + _LOGITS * text.context * vocabulary
    alone += _PROCESS if pick_device(run.device).type == "cpu" else 0
    bandwidth = 2 * speed.BANDWIDTH_BYTES if run.eval.speed else 0  # measured before the baseline is there
    return alone + max(dense, bandwidth), alone


def _baseline(job: JobPlan, run: Run, checkpoint: Checkpoint) -> JobPlan:
    config = skeleton(checkpoint).config
    dense, weights = _sizes(checkpoint)
    text = _Evaluation.of(run.eval, config)
    peak, least = _evaluation_memory(run, 0, dense, text, config)
    work = {"evaluate": _evaluate(run.eval, dense, dense, weights, text, False)} if job.state != FINISHED else {}
    unknown = [text.why] if text.why and work else []
    return replace(job, memory={"evaluate": peak}, least=least, work=work, unknown=unknown)


def _quantized(job: JobPlan, run: Run, checkpoint: Checkpoint, recipe: Recipe, settings: RecipeSettings) -> JobPlan:
    device = pick_device(run.device)
    units: list[BudgetUnit] = []
    if recipe.budget:
        plan, units = plan_search(checkpoint, recipe)
    else:
        plan = make_plan(checkpoint, recipe)
    config = plan.model.config
    dense, weights = _sizes(checkpoint)
    written = {unit.name: sum(plan.stored_bytes(tensor) for tensor in unit.tensors) for unit in plan.units}
    fixed = sum(path.stat().st_size for path in checkpoint.other_files())
    if recipe.budget:
        written = _within(recipe, plan, units, written, fixed)
    names = plan.format.weight_files(len(plan.units))
    shares = list(written.values()) if len(names) == len(plan.units) else [sum(written.values())]
    files = dict(zip(names, shares)) | {path.name: path.stat().st_size for path in checkpoint.other_files()}
    count = len(plan.quantized)
    files |= {"config.json": _FEW, MANIFEST: _FEW + _LINE * count}
    files |= {INDEX: _FEW + _LINE * count} if len(names) > 1 else {}
    artifact = sum(files.values())
    text = _Evaluation.of(run.eval, config)
    beside, alone = _evaluation_memory(run, dense, artifact, text, config)
    total = _memory(device)
    memory = {"quantize": _quantize_memory(plan, recipe, settings, units), "evaluate": min(beside, max(alone, total))}
    tokens = _calibration_tokens(recipe, settings, config)
    hidden = getattr(config.get_text_config(), "hidden_size", 0)
    disk = artifact + 4 * tokens * hidden * plan.dtype.itemsize
    disk += sum(sum(unit.sizes(plan)) for unit in units)
    if beside > total:
        disk += stored_predictions.bytes_per_token() * (text.tokens or 0)
    specs = {spec.name: spec for unit in units for spec in unit.specs if spec}
    specs |= {tensor.spec.name: tensor.spec for tensor in plan.quantized if tensor.spec}
    work: dict[str, Work] = {}
    if not (job.folder / "artifact" / MANIFEST).exists():
        work["quantize"] = _quantize_work(plan, recipe, tokens, units, device, artifact)
    else:
        disk = 0
    if job.state != FINISHED:
        work["evaluate"] = _evaluate(run.eval, dense, artifact, weights, text, True)
    _check_kernel(run.eval, plan, device)
    kept: dict[str, list[str]] = {}
    for tensor in plan.tensors:
        if not tensor.spec:
            kept.setdefault(tensor.reason, []).append(tensor.info.name)
    return replace(
        job,
        format=plan.format.name,
        files=files,
        weights=sum(prod(tensor.shape) for tensor in plan.quantized),
        memory=memory,
        least=max(memory["quantize"] if device.type == "cpu" else 0, alone),
        disk=disk,
        work=work,
        unknown=[text.why] if text.why and work else [],
        kept=kept,
        runtimes=runtimes_of(plan),
        notes=plan.notes,
        layers=[(spec, _largest(plan, spec, units)) for spec in specs.values()],
        search=recipe.budget is not None,
        gathering=_gathering(plan, recipe, tokens),
    )


def runtimes_of(plan: Plan) -> dict[str, dict[str, Any]]:
    """Who loads what a plan makes; see checkpoints.runtimes.verdicts."""
    targets = {tensor.module: tensor.target for tensor in plan.quantized}
    layers = {t.module: (t.spec.scheme, (t.shape[0], t.shape[1])) for t in plan.quantized if t.spec}
    return verdicts(facts_of(plan.format, plan.model, TensorNames(plan.model), targets, layers, plan.kept))


def _within(recipe: Recipe, plan: Plan, units: list[BudgetUnit], written: dict[str, int], fixed: int) -> dict[str, int]:
    """The bytes of each unit of a plan as a budget will have them: in proportion, so that the sum is the budget's."""
    assert recipe.budget
    chosen = {tensor.info.name for unit in units for tensor in unit.layers}
    rest = fixed + sum(plan.stored_bytes(tensor) for tensor in plan.tensors if tensor.info.name not in chosen)
    budget = recipe.budget
    if budget.nbytes is not None:
        total = budget.nbytes - fixed
    else:
        total = rest - fixed + int((budget.bits or 0.0) * sum(unit.weights for unit in units) / 8)
    share = total / sum(written.values())
    return {name: int(share * nbytes) for name, nbytes in written.items()}


def _check_kernel(settings: Eval, plan: Plan, device: torch.device) -> None:
    """Raises ConfigError where the kernel that is asked for by name cannot run a layer of the plan here."""
    dtype = plan.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    if settings.kernel in AUTOMATIC:
        return
    for tensor in {t.spec.scheme: t for t in plan.quantized if t.spec}.values():
        assert tensor.spec
        try:
            select(
                QTensor.without_content(tensor.spec.scheme, (tensor.shape[0], tensor.shape[1])),
                dtype,
                device,
                settings.kernel,
            )
        except ValueError as error:
            raise ConfigError(f"eval.kernel: {error}") from error


def _largest(plan: Plan, spec: LayerSpec, units: list[BudgetUnit]) -> Shape:
    """[out, in] of the largest layer that has a spec, or may have it."""
    own = [tensor for tensor in plan.quantized if tensor.spec and tensor.spec.name == spec.name]
    own += [tensor for unit in units if spec in unit.specs for tensor in unit.layers]
    shape = max((tensor.shape for tensor in own), key=prod)
    return shape[0], shape[1]


def _calibration_tokens(recipe: Recipe, settings: RecipeSettings, config: Any) -> int:
    """How many tokens calibrated methods are given; 0 where none is calibrated."""
    if not recipe.calibrated:
        return 0
    chosen = calibration_of(settings)
    return chosen.windows * longest(config, chosen.context)


def _quantize_memory(plan: Plan, recipe: Recipe, settings: RecipeSettings, units: list[BudgetUnit]) -> int:
    """Bytes at the peak of quantizing: of the process, a shard read, made and being written, and what a layer takes.

    Calibrated methods add the tensors outside the blocks, the activations of a few batches, and statistics; those that
    learn what a block takes with its gradients; a budget's probes the whole model in float32.
    """
    largest = max(sum(tensor.info.nbytes + plan.stored_bytes(tensor) for tensor in unit.tensors) for unit in plan.units)
    widest = max(prod(tensor.shape) for tensor in plan.quantized)
    total = _PROCESS + 2 * largest + 12 * widest
    if not recipe.calibrated:
        return total
    config = plan.model.config.get_text_config()
    outside = sum(tensor.info.nbytes for tensor in plan.tensors if tensor.block is None)
    batch = BATCH_TOKENS.get(recipe.device, BATCH_TOKENS["cpu"])
    inner = max(max(tensor.shape) for tensor in plan.quantized)
    activations = _BATCHES_AT_A_TIME * batch * 3 * inner * 4
    statistics: dict[int | None, int] = {}
    for tensor in plan.quantized:
        if tensor.spec and not tensor.target.expert:
            own = sum(kind.nbytes(tensor.shape[1]) for kind in tensor.spec.method.statistics)
            statistics[tensor.block] = statistics.get(tensor.block, 0) + own
    total += outside + activations + max(statistics.values(), default=0)
    total += 4 * longest(plan.model.config, calibration_of(settings).context) * config.vocab_size
    if any(spec.method.learns for spec in recipe.rules.specs()):
        blocks = [unit for unit in plan.units if unit.block is not None]
        total += _LEARNED * max(sum(prod(t.shape) for t in unit.tensors if t.spec) for unit in blocks)
    if units:
        whole = 4 * sum(prod(tensor.info.shape) for tensor in plan.tensors)
        total = max(total, _PROCESS + whole + _LOGITS * PROBE_TOKENS * config.vocab_size)
    return total


def _gathering(plan: Plan, recipe: Recipe, tokens: int) -> Work:
    """The pass of the unquantized model that others may share: each block runs for its statistics and its outputs."""
    if recipe.sequential and not recipe.budget:
        return Work()
    inside = (tensor for tensor in plan.tensors if tensor.block is not None and len(tensor.info.shape) > 1)
    return Work(products=4.0 * sum(prod(tensor.shape) for tensor in inside) * tokens)


def _quantize_work(
    plan: Plan, recipe: Recipe, tokens: int, units: list[BudgetUnit], device: torch.device, artifact: int
) -> Work:
    """The work of making an artifact. A budget solves each layer by each choice, and probes each of these."""
    inside = sum(
        prod(tensor.shape) for tensor in plan.tensors if tensor.block is not None and len(tensor.info.shape) > 1
    )
    choices = [(tensor, spec) for unit in units for spec in unit.specs if spec for tensor in unit.layers]
    choices = choices or [(tensor, tensor.spec) for tensor in plan.quantized if tensor.spec]
    rounded: dict[str, tuple[LayerSpec, float]] = {}
    for tensor, spec in choices:
        slower = max(1.0, tensor.shape[1] / 2048) if spec.method.statistics else 1.0
        before = rounded.get(spec.name, (spec, 0.0))[1]
        rounded[spec.name] = spec, before + slower * prod(tensor.shape)
    products, statistics = 0.0, 0.0
    if tokens:
        batches = max(1, tokens // BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"]))
        learned = max((spec.method.learning_passes(batches) for spec in recipe.rules.specs()), default=0.0)
        passes = 2.0 + (2.0 if recipe.transform else 0.0) + learned
        products = 2.0 * inside * tokens * passes
        inputs = {(tensor.block, tensor.shape[1]): tensor for tensor in plan.quantized if tensor.block is not None}
        statistics = sum(
            float(tokens) * tensor.shape[1] ** 2
            for tensor in inputs.values()
            if tensor.spec and tensor.spec.method.statistics
        )
    if units:
        reading = min(PROBE_TOKENS, tokens)
        products += sum(len(unit.specs) for unit in units) * inside * reading  # half of the blocks, on average
    source = sum(tensor.info.nbytes for tensor in plan.tensors)
    return Work(products=products, statistics=statistics, read=source, written=artifact, rounded=rounded)
