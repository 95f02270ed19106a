"""What one job will take, from the headers of its model: the model is built without weights, and asked.

Figures of memory and time are estimates. Each is a sum of parts that are written down here, with what was left out.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from bitpress.eval.measure import speed, stored_predictions
from bitpress.eval.measure.memory import LENGTHS
from bitpress.eval.measure.protocols import CONTEXTS
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.registry import AUTOMATIC, select

from ..checkpoints.facts import facts_of
from ..checkpoints.headers import model_facts
from ..checkpoints.runtimes import verdicts
from ..config.load import calibration_of
from ..config.schema import Eval, RecipeSettings, Run
from ..data.text import read_text
from ..data.tokens import longest
from ..errors import ConfigError
from ..formats.names import fused_unit
from ..models.structure import TensorNames, skeleton
from ..quantize.block_runner import BATCH_TOKENS, divide, work_on
from ..quantize.budget import BudgetUnit, fitted_and_held_out, plan_search
from ..quantize.distill import CHECKS, MOST_HELD_OUT
from ..quantize.plan import Plan, PlannedTensor, blocks_at_a_time, make_plan
from ..quantize.recipe import Recipe
from ..quantize.spec import LayerSpec
from ..storage.checkpoint import INDEX, Checkpoint
from ..storage.fingerprint import MANIFEST
from ..system.device import pick_device, total_memory
from .job_plan import FINISHED, JobPlan, Work
from .rates import Shape

# Bytes of a process that has imported torch and transformers: 400 to 450 MB on Linux with the CPU build of torch 2.13.
_PROCESS = 450 << 20
_BATCHES_AT_A_TIME = 4
_CHARACTERS = 4  # of text for a token, about; what is measured is the text's length
_LINE, _FEW = 400, 2000  # bytes that index and manifest have for each layer, and besides
_LEARNED = 24  # bytes for each weight of a block that a method learns: float32 copies, gradients, two moments of Adam
_DISTILLED = 20  # bytes for each weight while the whole model is distilled: float32 weights, gradients, and codes
# Bytes of float32 copies, codes and errors for each weight that GPTQ works on, and of its Hessian's factor for each of
# the Hessian: 31 bytes and 4.1 were measured on layers of 4096 inputs, of 4096 rows on two threads.
_SOLVED, _FACTORED = 40, 5
_ROWS = (1024, 2048)  # that a thread of GPTQ works on
_ROUNDED, _DEQUANTIZED = 12, 6  # for each weight that is rounded just now; for each of a layer that is put back
_LOGITS = 16  # bytes for each logit while two models are compared: both, in float32, and what they are turned into


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


def baseline(job: JobPlan, run: Run, checkpoint: Checkpoint) -> JobPlan:
    """The job of the unquantized model, with what it will take."""
    config = skeleton(checkpoint).config
    dense, weights = _sizes(checkpoint)
    text = _Evaluation.of(run.eval, config)
    peak, least = _evaluation_memory(run, 0, dense, text, config)
    work = {"evaluate": _evaluate(run.eval, dense, dense, weights, text, False)} if job.state != FINISHED else {}
    unknown = [text.why] if text.why and work else []
    return replace(job, memory={"evaluate": peak}, least=least, work=work, unknown=unknown)


def quantized(job: JobPlan, run: Run, checkpoint: Checkpoint, recipe: Recipe, settings: RecipeSettings) -> JobPlan:
    """The job of a recipe, with what it will take.

    Raises:
        BitpressError: why the recipe, or the kernel that is asked for, does not fit the model.
    """
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
    total = total_memory(device)
    memory = {"quantize": _quantize_memory(plan, recipe, settings, units), "evaluate": min(beside, max(alone, total))}
    tokens = _calibration_tokens(recipe, settings, config)
    hidden = getattr(config.get_text_config(), "hidden_size", 0)
    disk = artifact + 4 * tokens * hidden * plan.activation_dtype.itemsize
    disk += sum(sum(unit.sizes(plan)) for unit in units)
    if recipe.distill:
        disk += artifact  # what it begins with; its state is small beside that
    if beside > total:
        disk += stored_predictions.bytes_per_token() * (text.tokens or 0)
    specs = {spec.name: spec for unit in units for spec in unit.specs if spec}
    specs |= {tensor.spec.name: tensor.spec for tensor in plan.quantized if tensor.spec}
    work: dict[str, Work] = {}
    if not (job.folder / "artifact" / MANIFEST).exists():
        if units:
            work["search"] = _quantize_work(plan, recipe, settings, tokens, units, device, 0, run.gpus)
        work["quantize"] = _quantize_work(plan, recipe, settings, tokens, [], device, artifact, run.gpus)
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
        cache=_cache_sizes(plan),
        notes=plan.notes,
        layers=[(spec, _largest(plan, spec, units)) for spec in specs.values()],
        search=recipe.budget is not None,
        gathering=0.0 if recipe.sequential and not recipe.budget else 4.0 * _inside(plan) * tokens,
    )


def runtimes_of(plan: Plan) -> dict[str, dict[str, Any]]:
    """Who loads what a plan makes; see checkpoints.runtimes.verdicts."""
    targets = {tensor.module: tensor.target for tensor in plan.quantized}
    layers = {t.module: (t.spec.scheme, (t.shape[0], t.shape[1])) for t in plan.quantized if t.spec}
    model = model_facts(plan.model, TensorNames(plan.model), targets)
    cache = plan.cache.cache if plan.cache else None
    return verdicts(facts_of(plan.format, model, layers, plan.kept, cache=cache))


def _cache_sizes(plan: Plan) -> dict[str, dict[str, int]]:
    """Type of cache, and "unquantized" -> number of tokens -> bytes of one sequence; {} where it is not quantized."""
    if plan.cache is None:
        return {}
    sizes = {}
    for name, cache in ((plan.cache.cache.name, plan.cache.cache), ("unquantized", None)):
        kept = [(each.window, each.nbytes(cache, plan.model.dtype)) for each in plan.cache.shapes.values()]
        sizes[name] = {str(n): sum(min(n, window or n) * nbytes for window, nbytes in kept) for n in LENGTHS}
    return sizes


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
    """Bytes at the peak of quantizing, which is that of its hungriest step.

    Steps are: units read, made and being written, several at a time where blocks do not depend on each other; the
    tensors outside the blocks in the model, for its embeddings and its logits; a calibrated block with the activations
    of a few batches, the statistics of its layers, and what solving the hungriest of them takes. Methods that learn add
    a block's gradients; a budget holds what a block's layers read for its windows held out, and their gradients;
    distillation holds the whole model in float32, what is learned, and what the gradient of a window needs.
    """
    sizes = [
        sum(each.info.nbytes + (plan.stored_bytes(each) if each.spec else 0) for each in unit.tensors)
        for unit in plan.units
    ]
    threads, workers = torch.get_num_threads(), blocks_at_a_time(plan)
    widest = max((prod(tensor.shape) for tensor in plan.quantized), default=0)
    layer = _ROUNDED * min(widest, threads << 20) + _DEQUANTIZED * widest
    if not recipe.calibrated:
        return _PROCESS + (workers + 1) * max(sizes) + workers * layer
    config = plan.model.config.get_text_config()
    outside = sum(tensor.info.nbytes for tensor in plan.tensors if tensor.block is None)
    logits = 4 * longest(plan.model.config, calibration_of(settings).context) * config.vocab_size
    inner = max(max(tensor.shape) for tensor in plan.tensors if tensor.block is not None)
    batch = BATCH_TOKENS.get(torch.device(recipe.device).type, BATCH_TOKENS["cpu"])
    activations = min(threads, _BATCHES_AT_A_TIME) * batch * 3 * inner * 4
    if _by_gradient(recipe):  # of 2048 and 8192 channels: 17 bytes more a token and channel were measured
        activations = int(2.4 * activations)
    statistics, solving = 0, layer
    for unit in plan.units:
        gathered: dict[tuple[int, str], int] = {}  # layers of a fused unit read one input, and mostly share statistics
        for each in unit.tensors if unit.block is not None else ():
            if each.spec and (kinds := each.spec.method.statistics):
                own = sum(kind.nbytes(each.shape[1]) for kind in kinds)
                rows = min(each.shape[0], threads * min(max(-(-each.shape[0] // threads), _ROWS[0]), _ROWS[1]))
                solve = max(_FACTORED * own, _SOLVED * each.shape[1] * rows)
                solving = max(solving, solve + _DEQUANTIZED * prod(each.shape))
                if not each.target.expert:
                    alone = any(kind.by_gradient for kind in kinds)
                    gathered[each.shape[1], each.module if alone else fused_unit(each.module)] = own
        statistics = max(statistics, sum(gathered.values()))
    steps = [2 * max(sizes), outside + max(logits, max(sizes)), 2 * max(sizes) + activations + statistics + solving]
    if not recipe.sequential:  # blocks are solved from statistics on the disk
        steps.append((workers + 1) * max(sizes) + workers * (statistics + solving))
    if any(spec.method.learns for spec in recipe.rules.specs()):
        learned = [
            sum(prod(each.shape) for each in unit.tensors if each.spec) for unit in plan.units if unit.block is not None
        ]
        steps[2] += _LEARNED * max(learned)
    total = _PROCESS + max(steps)
    if units:
        gradients = 4 * _held_out(settings, plan.model.config) * _widths(units, config)
        measured = 4 * outside + max(2 * max(sizes) + activations, 4 * logits)
        weighed = 2 * max(sizes) + max(activations, logits) + gradients + layer
        total = max(total, _PROCESS + max(weighed, measured))
    if recipe.distill:
        whole = 4 * sum(prod(tensor.info.shape) for tensor in plan.tensors)
        trained = _DISTILLED * sum(prod(tensor.shape) for tensor in plan.quantized)
        tokens = longest(plan.model.config, calibration_of(settings).context)
        depth = len({tensor.block for tensor in plan.quantized})
        kept = 4 * tokens * 8 * inner * depth  # of a window, for its gradient
        total = max(total, _PROCESS + whole + trained + kept + 2 * _LOGITS * tokens * config.vocab_size)
    return total


def _held_out(settings: RecipeSettings, config: Any) -> int:
    """How many of a budget's calibration tokens are held out."""
    chosen = calibration_of(settings)
    ids = torch.empty(chosen.windows, longest(config, chosen.context), dtype=torch.int64, device="meta")
    return fitted_and_held_out(ids)[1].numel()


def _widths(units: list[BudgetUnit], config: Any) -> int:
    """Inputs and outputs of a block's layers, for a token; of experts, those that it goes through."""
    widths: dict[int, float] = {}
    for unit in units:
        dense = [planned for planned in unit.layers if planned.target.expert is None]
        experts = [planned for planned in unit.layers if planned.target.expert]
        own = float(sum(sum(planned.shape) for planned in dense))
        if experts:
            share = getattr(config, "num_experts_per_tok", None) or len(experts)
            number = len({planned.target.expert[0] for planned in experts if planned.target.expert})
            own += min(1.0, share / number) * sum(sum(planned.shape) for planned in experts)
        widths[unit.block] = widths.get(unit.block, 0.0) + own
    return round(max(widths.values(), default=0))


def _by_gradient(recipe: Recipe) -> bool:
    """Whether blocks have a backward pass."""
    return any(kind.by_gradient for spec in recipe.specs() for kind in spec.statistics)


def _inside(plan: Plan) -> int:
    """How many weights of matrices lie in the decoder's blocks."""
    return sum(prod(each.shape) for each in plan.tensors if each.block is not None and len(each.info.shape) > 1)


def _quantize_work(
    plan: Plan,
    recipe: Recipe,
    settings: RecipeSettings,
    tokens: int,
    units: list[BudgetUnit],
    device: torch.device,
    artifact: int,
    gpus: int,
) -> Work:
    """The work of making an artifact or, for the units of a budget, of solving and weighing them by each choice.

    Passes over calibration text are divided by the number of GPUs; statistics and solutions as the layers of a block
    can be. One GPU does the rest: what learns from a whole block, a budget's costs, distillation.
    """
    inside, source = _inside(plan), sum(tensor.info.nbytes for tensor in plan.tensors)
    if recipe.budget and not recipe.sequential and not units:  # what was searched is packed
        return Work(read=source, written=artifact)
    choices = [(tensor, spec) for unit in units for spec in unit.specs if spec for tensor in unit.layers]
    planned = [(tensor, tensor.spec) for tensor in plan.quantized if tensor.spec]
    judged = recipe.transform.solves if recipe.transform else 0
    choices = (choices or planned) + planned * judged
    rounded: dict[str, tuple[LayerSpec, float]] = {}
    for tensor, spec in choices:
        slower = max(1.0, tensor.shape[1] / 2048) if spec.method.statistics else 1.0
        before = rounded.get(spec.name, (spec, 0.0))[1]
        rounded[spec.name] = spec, before + slower * prod(tensor.shape)
    products, statistics, learned = 0.0, 0.0, 0.0
    if tokens:
        batches = max(1, tokens // BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"]))
        whole = 2.0 + (2.0 if recipe.transform else 0.0) + (1.0 if judged else 0.0)
        if _by_gradient(recipe):
            whole += 1.0  # a backward pass, which makes no gradients of weights
        if not units:
            whole += 1.0 if recipe.static_cache else 0.0
            learned = max((spec.method.learning_passes(batches) for spec in recipe.rules.specs()), default=0.0)
        passes = whole / gpus + learned
        products = 2.0 * inside * tokens * passes
        inputs = {(tensor.block, tensor.shape[1]): tensor for tensor in plan.quantized if tensor.block is not None}
        statistics = sum(
            float(tokens) * tensor.shape[1] ** 2
            for tensor in inputs.values()
            if tensor.spec and tensor.spec.method.statistics
        ) * (2 if judged else 1)
    reading = _held_out(settings, plan.model.config) if recipe.budget else 0
    if units:  # there, there once more and back; a product by each choice; and three models are measured
        each = sum(len(unit.specs) * unit.weights for unit in units)
        products += 2.0 * reading * (6 * inside + each)
    elif recipe.budget:  # the finished model is measured beside the unquantized one
        products += 4.0 * inside * reading
    if recipe.distill and not units:
        # a step: a forward of the unquantized model, and a forward and a backward of the other
        width = longest(plan.model.config, calibration_of(settings).context)
        windows = 4 * recipe.distill.steps * recipe.distill.windows + 2 * CHECKS * MOST_HELD_OUT
        products += 2.0 * inside * width * windows
    share = 1.0
    if tokens and gpus > 1:  # blocks that do not wait for each other are divided as a whole
        share = _largest_share(plan, gpus) if recipe.sequential or recipe.budget else 1 / gpus
    rounded = {name: (spec, share * weights) for name, (spec, weights) in rounded.items()}
    return Work(products=products, statistics=share * statistics, read=source, written=artifact, rounded=rounded)


def _largest_share(plan: Plan, gpus: int) -> float:
    """The share of the work on a block's layers that the GPU has that has most of it, for the first quantized block."""
    groups: dict[tuple[int, str], list[PlannedTensor]] = {}  # layers of a fused unit read one input
    first = min((each.block for each in plan.quantized if each.block is not None), default=None)
    for each in plan.quantized:
        if each.block is not None and each.block == first:
            groups.setdefault((each.shape[1], fused_unit(each.module)), []).append(each)
    loads = [0] * gpus
    for group, number in zip(groups.values(), divide(list(groups.values()), gpus)):
        loads[number] += work_on(group)
    return max(loads) / sum(loads) if groups else 1.0
