"""Chooses a scheme for each layer so that the artifact meets a size and its KL divergence is the least.

Three steps, each of which survives a crash. The first two are done once for all budgets of one calibration:

- Solve. The unquantized model goes through the calibration tokens once, block by block. Each layer is quantized by each
  choice from the same statistics, and all solutions are kept. A few calibration windows are held out.
- Weigh. What each layer costs at each choice, in KL divergence of the model, is estimated from the gradient of the
  model's logits on the windows held out: see costs.py. On windows that the solutions were fitted to, each would seem to
  cost less than it does on other text, and layers with many inputs would seem so most. A unit is what servers fuse and
  so must have one scheme: q, k and v; gate and up; all experts of a block.
- Choose. Divergences of small errors add up over layers (HIGGS, arXiv 2411.17525, theorem 1), so the least sum within a
  size is a knapsack problem. It is solved exactly, for all sizes at once: that is the curve of KL against bytes. Errors
  of many units together are more than the sum; so what is best by it is measured beside one choice for all units.

Then the model is quantized by what was chosen, block by block, each on what the quantized blocks before it put out, as
any calibrated recipe is: later blocks make up for some of the errors of earlier ones. With `sequential: false` the
solutions that were searched are packed as they are.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitpress.eval.measure import scores
from bitpress.kernels.qtensor import QTensor

from ..data.calibration import hold_out
from ..errors import ConfigError, listing
from ..formats import misfits
from ..formats import registry as formats
from ..formats.base import Format
from ..formats.names import fused_unit
from ..methods.base import Diagnostics
from ..storage import files, journal
from ..storage.checkpoint import Checkpoint
from ..storage.fingerprint import digest, open_work
from ..system.progress import OnStep
from ..transforms.base import Transformed
from .block_runner import BlockRunner, Stored
from .costs import costs_by_gradient
from .plan import Plan, PlannedTensor, make_plan, patterns
from .recipe import Recipe, fingerprint, order_of_sums
from .sequential import CalibratedBlocks, clear_states
from .spec import KEPT, LayerSpec, Rules
from .statistics import SHARED, SharedStatistics

HELD_OUT_TOKENS = 8192  # of the calibration text, at most, which tell costs and judge what was chosen
_MOST_POINTS = 1 << 16  # of the curve that are held; beyond, sizes are told apart to 1/65536 of the largest
_CURVE = 40  # points of the curve that are recorded
_READ = "read"  # the folder of what blocks read while costs are estimated
_TRANSFORMED = "transformed"  # in the names of tensors in a block's solutions, before those in the files
_LINE = 1024  # bytes of config.json, index and manifest for a layer, at most
_FEW = 1 << 16  # bytes of what else these files hold


@dataclass(frozen=True)
class BudgetUnit:
    """Layers that get one choice together.

    specs: the choices; None keeps the layers as they are. fixed: a rule of the recipe leaves no choice.
    """

    name: str
    block: int
    layers: tuple[PlannedTensor, ...]
    specs: tuple[LayerSpec | None, ...]
    fixed: bool = False

    @property
    def weights(self) -> int:
        return sum(prod(planned.shape) for planned in self.layers)

    def sizes(self, plan: Plan) -> list[int]:
        """The bytes of the unit in the artifact, for each choice."""
        return [sum(plan.stored_bytes(replace(planned, spec=spec)) for planned in self.layers) for spec in self.specs]

    @property
    def patterns(self) -> list[str]:
        """Patterns of names that fit these layers and no others."""
        return patterns(self.name, self.layers)


@dataclass(frozen=True)
class Front:
    """Every size at which a larger one first pays: the Pareto front of all combinations of choices.

    nbytes: int64 [points], rising. kl: float64 [points], falling. origins: for each unit int64 [points after it]: the
    point before it, times the number of its choices, and its choice.
    """

    nbytes: np.ndarray
    kl: np.ndarray
    origins: tuple[np.ndarray, ...]
    counts: tuple[int, ...]

    @staticmethod
    def of(nbytes: Sequence[Sequence[int]], kl: Sequence[Sequence[float]]) -> "Front":
        """The front of units of which each has choices of such sizes and divergences, by dynamic programming.

        After each unit only combinations are kept that no other beats in both. That is exact; where more than
        _MOST_POINTS are left, combinations that hardly differ in size are told apart no longer.
        """
        sizes, losses, origins = np.zeros(1, np.int64), np.zeros(1), []
        for own_sizes, own_losses in zip(nbytes, kl, strict=True):
            every = (sizes[:, None] + np.asarray(own_sizes, np.int64)).ravel()
            lost = (losses[:, None] + np.asarray(own_losses, np.float64)).ravel()
            order = np.lexsort((lost, every))
            best = np.minimum.accumulate(lost[order])
            order = order[np.concatenate(([True], best[1:] < best[:-1]))]
            if len(order) > _MOST_POINTS:  # the last of each cell, which loses least
                cells = every[order] * _MOST_POINTS // (int(every[order[-1]]) + 1)
                order = order[np.concatenate((cells[1:] != cells[:-1], [True]))]
            sizes, losses = every[order], lost[order]
            origins.append(order)
        return Front(sizes, losses, tuple(origins), tuple(map(len, nbytes)))

    def choice(self, point: int) -> list[int]:
        """Each unit's choice at a point of the front."""
        chosen = []
        for origin, count in zip(reversed(self.origins), reversed(self.counts)):
            point, own = divmod(int(origin[point]), count)
            chosen.append(own)
        return chosen[::-1]


class Search:
    """The solutions and costs of one model and one calibration, in a folder of their own.

    A recipe's budget takes no part in them: all budgets that have the rest in common share them.
    held_out: calibration windows that estimate costs, and judge what is chosen, int64 [windows, context].
    fitted: the calibration without these, which solutions are fitted to. A single window is both.
    """

    def __init__(self, checkpoint: Checkpoint, source: dict[str, Any], recipe: Recipe, folder: Path):
        """Plan, and take up what is finished; no weight is read yet.

        Args:
            folder: SHARED of a run; the search has a folder in it, and its statistics another.
        Raises:
            ConfigError: as of make_plan; or no format holds all choices.
        """
        assert recipe.calibration
        self.checkpoint, self.recipe = checkpoint, replace(recipe, fit_groups=True, allow_split_fused=True)
        self.plan, self.units = plan_search(checkpoint, recipe)
        ids = recipe.calibration.ids
        fitted, self.held_out = fitted_and_held_out(ids)
        self.fitted = replace(recipe.calibration, ids=fitted)
        self._solving = replace(self.recipe, calibration=self.fitted)
        origin = fingerprint(checkpoint, source, recipe) | order_of_sums(recipe)
        of_the_choice = ("quantize.budget", "quantize.budget.version", "quantize.sequential")  # not of what it is among
        origin = {key: value for key, value in origin.items() if key not in of_the_choice}
        origin["search.held_out"] = len(self.held_out)
        self.folder = folder / digest(origin)[:12]
        files.make_folder(self.folder)
        open_work(self.folder, origin)
        self.statistics = SharedStatistics(self.plan, source, self._solving, folder)
        self.journal = journal.Journal(self.folder / journal.NAME)
        self._solved = {line["block"]: line for line in self.journal.entries if "solutions" in line}
        self._costs: dict[str, list[float]] = {}
        for line in self.journal.entries:
            self._costs |= line.get("costs", {})
        self._measured = {line["choice"]: line["measured"] for line in self.journal.entries if "measured" in line}

    def run(self, on_step: OnStep = lambda done, total: None) -> None:
        """Solve what is not solved yet, and estimate what it costs.

        Args:
            on_step: called with (passes over blocks done, three times as many as there are blocks).
        """
        blocks = sum(unit.block is not None for unit in self.plan.units)
        self._solve(on_step, 3 * blocks)
        if not self._costs:
            self._weigh(lambda done, total: on_step(blocks + done, 3 * blocks))
        on_step(3 * blocks, 3 * blocks)

    @cached_property
    def _choices(self) -> dict[str, list[LayerSpec]]:
        """What each layer may be quantized by."""
        return {planned.module: [spec for spec in unit.specs if spec] for unit in self.units for planned in unit.layers}

    def _file(self, block: int) -> Path:
        return self.folder / f"{block:05d}.safetensors"

    def _finished(self, block: int) -> bool:
        """Whether the block's solutions are there, as they were written."""
        line, path = self._solved.get(block), self._file(block)
        return line is not None and path.exists() and files.sha256_file(path) == line["sha256"]

    def _solve(self, on_step: OnStep, total: int) -> None:
        units = [unit for unit in self.plan.units if unit.block is not None]
        first = next((n for n, unit in enumerate(units) if not self._finished(unit.block or 0)), len(units))
        if first == len(units):
            return
        blocks = CalibratedBlocks(self.plan, self._solving, self.folder, shared=self.statistics)
        if first and not blocks.state(units[first].block or 0).exists():
            first = 0
        files.preflight(self.folder, blocks.nbytes() + sum(sum(unit.sizes(self.plan)) for unit in self.units))
        for number, unit in enumerate(units[first:], first):
            assert unit.block is not None
            on_step(number, total)
            tensors: dict[str, Tensor] = {}
            reports: dict[str, dict[str, Any]] = {}
            for planned, qtensor, diagnostics in blocks.solve_block(unit, self._choices):
                key = _key(planned)
                tensors |= {f"{key}/{name}": tensor.cpu() for name, tensor in qtensor.tensors()}
                reports[key] = asdict(diagnostics)
            tensors |= {f"{_TRANSFORMED}/{name}": tensor for name, tensor in blocks.changed.items()}
            written = files.write_safetensors(self._file(unit.block), tensors)
            line = {"block": unit.block, "solutions": reports, **written}
            if self.recipe.transform:
                line["transform"] = [asdict(each) for each in blocks.transformed]
            self.journal.append(line)
            self._solved[unit.block] = line
            blocks.committed(unit.block)
        clear_states(self.folder)

    def solution(self, planned: PlannedTensor) -> tuple[QTensor, Diagnostics]:
        """A layer as it was solved by the spec that it has."""
        assert planned.spec
        assert planned.block is not None
        key, stored = _key(planned), Checkpoint.single(self._file(planned.block))
        scheme, shape = planned.spec.scheme, (planned.shape[0], planned.shape[1])
        tensors = {name: stored.read(f"{key}/{name}") for name in scheme.layout(shape)}
        qtensor = QTensor.of(scheme, shape, tensors)
        return qtensor, Diagnostics(**self._solved[planned.block]["solutions"][key])

    def read(self, planned: PlannedTensor) -> Tensor:
        """A tensor before it is quantized, as the recipe's transform left it; the files', where there is none."""
        if self.recipe.transform and planned.block is not None:
            stored, name = Checkpoint.single(self._file(planned.block)), f"{_TRANSFORMED}/{planned.info.name}"
            if name in stored.tensors:
                return stored.read(name)
        return self.plan.checkpoint.read(planned.info.name)

    def transformed(self, block: int) -> list[Transformed]:
        """What the transform did to a block."""
        lines = self._solved[block].get("transform", [])
        return [Transformed(**{**line, "layers": tuple(line["layers"])}) for line in lines]

    def _weigh(self, on_step: OnStep) -> None:
        """Estimate what each unit costs at each choice from the gradient of the unquantized model."""
        units = {planned.module: unit for unit in self.units for planned in unit.layers}
        costs = {unit.name: [0.0] * len(unit.specs) for unit in self.units}
        for planned, cost in costs_by_gradient(
            self.plan,
            self._choices,
            self.held_out,
            self.recipe.device,
            self.read,
            lambda planned: self.solution(planned)[0],
            self.folder / _READ,
            on_step,
        ):
            unit = units[planned.module]
            costs[unit.name][unit.specs.index(planned.spec)] += cost
        self.journal.append({"costs": costs})
        self._costs = costs

    def measure(self, chosen: Sequence[int]) -> float:
        """The mean KL divergence of the model with all these solutions, on the windows held out, in nats."""
        key = digest({unit.name: own for unit, own in zip(self.units, chosen, strict=True)})[:16]
        if key not in self._measured:
            specs = {
                planned.info.name: unit.specs[own]
                for unit, own in zip(self.units, chosen, strict=True)
                for planned in unit.layers
            }

            def read(planned: PlannedTensor) -> Stored:
                if (spec := specs.get(planned.info.name)) is None:
                    return self.read(planned)
                return self.solution(replace(planned, spec=spec))[0]

            self._measured[key] = self.divergence(self.plan, read)
            self.journal.append({"choice": key, "measured": self._measured[key]})
        return self._measured[key]

    @torch.no_grad()
    def divergence(self, plan: Plan, read: Callable[[PlannedTensor], Stored]) -> float:
        """The mean KL divergence of a quantized model on the windows held out, in nats; no keys are rounded.

        Args:
            read: gives a tensor or a quantized layer of its plan.
        """
        expected, outputs = self._unquantized
        runner, own = self._last_outputs(plan, read)
        total = 0.0
        with expected.outside_in_memory(), runner.outside_in_memory():
            for number, ids in enumerate(self.held_out.split(1)):  # a window at a time: logits are large
                logits = expected.head(outputs[number], ids)[0], runner.head(own[number], ids)[0]
                for p, q in scores.rows(*logits):
                    probabilities, normalizer, _ = scores.best(p)
                    lost = scores.divergence(probabilities, p, q, normalizer - torch.logsumexp(q, -1))
                    total += lost.double().sum().item()
        return total / self.held_out.numel()

    @cached_property
    def _unquantized(self) -> tuple[BlockRunner, Sequence[Tensor]]:
        return self._last_outputs(self.plan, self.read)

    def _last_outputs(
        self, plan: Plan, read: Callable[[PlannedTensor], Stored]
    ) -> tuple[BlockRunner, Sequence[Tensor]]:
        """What the last block of a model puts out for each window held out, one block in memory at a time.

        It is of float32: the rounding of bfloat16 would hide what 8 bits cost.
        """
        outside = [planned for planned in plan.tensors if planned.block is None]
        runner = BlockRunner(plan.checkpoint, outside, self.held_out, torch.float32, self.recipe.device, read)
        return runner, torch.cat(runner.last_outputs(plan.units)).split(1)

    @cached_property
    def front(self) -> Front:
        """The curve of KL against the bytes of all units."""
        sizes = [unit.sizes(self.plan) for unit in self.units]
        return Front.of(sizes, [self._costs[unit.name] for unit in self.units])

    @property
    def weights(self) -> int:
        """How many weights the units have."""
        return sum(unit.weights for unit in self.units)

    @cached_property
    def rest(self) -> int:
        """Bytes of the artifact that no choice changes, rounded up: other tensors, headers, and companion files."""
        own = {planned.info.name for unit in self.units for planned in unit.layers}
        tensors = sum(self.plan.stored_bytes(planned) for planned in self.plan.tensors if planned.info.name not in own)
        companions = sum(path.stat().st_size for path in self.checkpoint.other_files())
        return tensors + companions + _LINE * len(self.plan.tensors) + _FEW

    @cached_property
    def uniform(self) -> dict[str, list[int]]:
        """Each choice that all units have -> its number in each. Units without a choice keep what their rule says."""
        own = [[_name(spec) for spec in unit.specs] for unit in self.units]
        free = [names for names, unit in zip(own, self.units) if not unit.fixed]
        return {
            name: [0 if unit.fixed else names.index(name) for names, unit in zip(own, self.units)]
            for name in dict.fromkeys(chain.from_iterable(free))
            if all(name in names for names in free)
        }

    def nbytes(self, chosen: Sequence[int]) -> int:
        """The bytes of all units, each at its choice."""
        return sum(unit.sizes(self.plan)[own] for unit, own in zip(self.units, chosen, strict=True))

    def predicted(self, chosen: Sequence[int]) -> float:
        """The sum of what each unit's choice costs."""
        return math.fsum(self._costs[unit.name][own] for unit, own in zip(self.units, chosen, strict=True))

    def choose(self) -> "Choice":
        """The best choice within the recipe's budget.

        Costs do not tell how errors of many units act together. So the best sum is measured as a whole, beside the
        best uniform choice that fits, and the one that diverges less is taken.

        Raises:
            ConfigError: the smallest choice of every unit is larger than the budget.
        """
        budget = self.recipe.budget
        assert budget
        limit = (budget.nbytes or 0) - self.rest if budget.bits is None else int(budget.bits * self.weights / 8)
        least = int(self.front.nbytes[0])
        if least > limit:
            raise ConfigError(
                f"budget {budget} cannot be met: the smallest choices take {8 * least / self.weights:.3f} bits per "
                f"weight, and the whole artifact {(least + self.rest) / 1e6:,.1f} MB; raise the budget, or name "
                "smaller choices, as in choices: [int2-g128, int4-g128]"
            )
        best = self.front.choice(int(np.searchsorted(self.front.nbytes, limit, side="right")) - 1)
        uniform = [own for own in self.uniform.values() if self.nbytes(own) <= limit]
        candidates = [best, *sorted(uniform, key=self.predicted)[:1]]
        return Choice(self, min(candidates, key=self.measure), candidates)


@dataclass(frozen=True)
class Choice:
    """What a search chose: for each unit the number of its choice.

    candidates: among which it was chosen by how the model as a whole diverges.
    """

    search: Search
    chosen: Sequence[int]
    candidates: Sequence[Sequence[int]]

    def recipe(self) -> Recipe:
        """The recipe with a rule for every layer in place of its budget; what is held out judges what comes of it."""
        recipe = replace(self.search.recipe, calibration=self.search.fitted)
        own = {
            pattern: unit.specs[number]
            for unit, number in zip(self.search.units, self.chosen, strict=True)
            for pattern in unit.patterns
            if not unit.fixed
        }
        rules = Rules(recipe.rules.default, own | dict(recipe.rules.layers))  # the recipe's own rules come last and win
        return replace(recipe, rules=rules, budget=None, choices=(), format=self.search.plan.format)

    def to_dict(self) -> dict[str, Any]:
        """The choice and the curve that it is of, in plain values; sizes in bytes, divergences in nats.

        Bits are per weight of the units. Divergences are means over tokens: predicted ones are sums of what units cost,
        "solutions_kl" is of the model with all the solutions, on the windows held out.
        """
        search, front = self.search, self.search.front
        sizes = [*np.linspace(front.nbytes[0], front.nbytes[-1], _CURVE), search.nbytes(self.chosen)]
        points = {int(np.searchsorted(front.nbytes, size, side="right")) - 1 for size in sizes}
        units = list(zip(search.units, self.chosen, strict=True))
        assert search.recipe.budget
        return {
            "budget": search.recipe.budget.name,
            "tokens": search.held_out.numel(),
            **self._figures(search.nbytes(self.chosen), search.predicted(self.chosen)),
            "solutions_kl": search.measure(self.chosen),
            "curve": [self._figures(int(front.nbytes[point]), float(front.kl[point])) for point in sorted(points)],
            "uniform": [
                {"choice": name, **self._figures(search.nbytes(own), search.predicted(own))}
                | ({"solutions_kl": search.measure(own)} if own in self.candidates else {})
                for name, own in search.uniform.items()
            ],
            "units": [
                {
                    "name": unit.name,
                    "choice": _name(unit.specs[own]),
                    "bits": 8 * unit.sizes(search.plan)[own] / unit.weights,
                    "kl": search._costs[unit.name][own],
                    "costs": dict(zip(map(_name, unit.specs), search._costs[unit.name], strict=True)),
                }
                for unit, own in units
            ],
        }

    def _figures(self, nbytes: int, predicted: float) -> dict[str, Any]:
        """Bits, bytes and divergence of units that take so many bytes."""
        return {
            "bits": 8 * nbytes / self.search.weights,
            "nbytes": nbytes + self.search.rest,
            "predicted_kl": predicted,
        }


def fitted_and_held_out(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Calibration windows that solutions are fitted to, and those that are held out: int64 [windows, context]."""
    return hold_out(ids, max(1, HELD_OUT_TOKENS // ids.shape[1]))


def search(
    checkpoint: Checkpoint,
    source: dict[str, Any],
    recipe: Recipe,
    folder: Path,
    on_step: OnStep = lambda done, total: None,
) -> Choice:
    """The best choice of schemes within a recipe's budget; what `folder` holds of earlier searches is used.

    Args:
        folder: see Search; others that share it wait as long as this search lasts.
    Raises:
        ConfigError: the budget cannot be met, or no format holds all choices. BitpressError: as of quantize.
    """
    files.make_folder(folder)
    with journal.locked(folder, math.inf):  # whoever holds it computes what this search needs, too
        own = Search(checkpoint, source, recipe, folder)
        own.run(on_step)
        return own.choose()


def clean(run: Path) -> list[Path]:
    """Delete what recipes share in a run's folder, or in those of its models; returns the folders that were deleted.

    Raises:
        ConfigError: there is no such folder. LockedError: a search, or a calibration pass, is going on.
    """
    if not run.is_dir():
        raise ConfigError(f"{run} is no folder; expected that of a run, such as runs/demo")
    kept = [path for path in (run / SHARED, *sorted(run.glob(f"*/{SHARED}"))) if path.is_dir()]
    for path in kept:
        with journal.locked(path):
            files.remove_folder(path)
    return kept


def plan_search(checkpoint: Checkpoint, recipe: Recipe) -> tuple[Plan, list[BudgetUnit]]:
    """What a budget chooses among, from headers: the plan with each layer at one of its choices, and the units.

    Raises:
        ConfigError: as of make_plan; or no format holds all choices.
    """
    plan = make_plan(checkpoint, replace(recipe, fit_groups=True, allow_split_fused=True))
    units = _units(plan, recipe)
    return replace(plan, format=_format(recipe.format, plan, units)), units


def _units(plan: Plan, recipe: Recipe) -> list[BudgetUnit]:
    """The units of a plan, in the order of its tensors. Layers that a rule names have no other choice."""
    layers: dict[tuple[str, LayerSpec | None], list[PlannedTensor]] = {}
    for planned in plan.quantized:
        if planned.block is not None:
            named = recipe.rules.pattern(planned.info.name) is not None
            layers.setdefault((fused_unit(planned.module), planned.spec if named else None), []).append(planned)
    units = []
    for (name, fixed), own in layers.items():
        specs: list[LayerSpec | None] = [fixed]
        if fixed is None:
            specs = []
            for spec in recipe.choices:
                for planned in own if spec else ():
                    spec = spec.fitted(planned.shape) if spec else None
                if spec is None or not any(spec.scheme.problems(planned.shape) for planned in own):
                    specs.append(spec)
        if not specs:
            raise ConfigError(f"none of the choices fits {name}; name others under choices, such as int4-channel")
        shown = name if fixed is None else f"{name} ({fixed.name})"
        block = own[0].block
        assert block is not None
        units.append(BudgetUnit(shown, block, tuple(own), tuple(dict.fromkeys(specs)), fixed is not None))
    return units


def _format(wanted: Format | None, plan: Plan, units: Sequence[BudgetUnit]) -> Format:
    """The format that is wanted or, for None, the first that holds every choice, and what rules quantize beside these.

    Raises:
        ConfigError: none does.
    """
    layers: dict[str, Any] = {
        f"{planned.module} as {spec.name}": (spec.scheme, planned.shape)
        for unit in units
        for planned in unit.layers
        for spec in unit.specs
        if spec
    }
    others = [planned for planned in plan.quantized if planned.block is None]  # such as embeddings and head
    layers |= {planned.module: (planned.spec.scheme, planned.shape) for planned in others if planned.spec}
    embeddings = [planned.module for planned in others if planned.kind == "embedding"]
    reasons = []
    for format in [wanted] if wanted else formats().values():
        if not (problems := misfits(format, layers, embeddings)):
            return format
        reasons += problems
    raise ConfigError(f"no format can hold all choices; name others under choices:\n{listing(reasons)}")


def _key(planned: PlannedTensor) -> str:
    assert planned.spec
    return f"{planned.module}/{planned.spec.name}"


def _name(spec: LayerSpec | None) -> str:
    return spec.scheme.name if spec else KEPT
