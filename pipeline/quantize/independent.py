"""Quantizes layers from the statistics of the unquantized model, so that no block waits for the one before it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bitpress.kernels.qtensor import QTensor

from ..methods.base import Diagnostics
from ..system.device import current
from ..system.threads import ahead
from ..transforms.base import Transformed
from .plan import Plan, PlannedTensor, Unit
from .recipe import Recipe
from .spec import LayerSpec
from .statistics import SharedStatistics
from .weights import quantize_calibrated, quantize_unreached, with_common_scales

Solution = tuple[PlannedTensor, QTensor, Diagnostics]


def solve(
    unit: Unit, choices: Mapping[str, Sequence[LayerSpec]], plan: Plan, recipe: Recipe, statistics: SharedStatistics
) -> Iterator[Solution]:
    """Each layer of a block by each spec that it may get; layers that read one input share what is computed of it.

    Args:
        choices: layer -> specs. Layers that are not named are kept.
    Raises:
        NumericsError: weights that are not finite, or that the format cannot express. ConfigError: see
            quantize_calibrated.
    """
    groups: dict[str, list[PlannedTensor]] = {}
    for planned in unit.tensors:
        if planned.module in choices:
            groups.setdefault(statistics.leader(planned.module), []).append(planned)
    for leader, group in groups.items():
        gathered = statistics.load(leader, group[0].shape[1], torch.device(recipe.device))
        for planned in group:
            weight = plan.checkpoint.read(planned.info.name)
            for spec in choices[planned.module]:
                own = replace(planned, spec=spec)
                if gathered is None and spec.needs_calibration:
                    yield own, *quantize_unreached(own, weight, plan)
                else:
                    yield own, *quantize_calibrated(own, weight, plan, gathered or {}, recipe)


class IndependentBlocks:
    """Gives each layer of a recipe that is not sequential as its method quantizes it, while blocks ahead are worked on.

    It is asked for layer after layer, in the order of the blocks; the first one tells at which block to begin.
    """

    def __init__(self, plan: Plan, recipe: Recipe, statistics: SharedStatistics, workers: int):
        """Nothing is quantized yet.

        Args:
            workers: how many blocks are worked on at a time; at least one on each of the recipe's devices.
        """
        self._plan, self._recipe, self._statistics = plan, recipe, statistics
        self._devices = [recipe.device, *recipe.more_devices]
        self._workers = max(workers, len(self._devices))
        self._blocks: Iterator[dict[str, Solution]] | None = None
        self._ready: dict[str, Solution] = {}

    def read(self, planned: PlannedTensor) -> Tensor:
        """A tensor as the files hold it: no transform goes with unquantized inputs."""
        return self._plan.checkpoint.read(planned.info.name)

    def transformed(self, block: int) -> list[Transformed]:
        """What a transform did to a block: nothing."""
        return []

    def solution(self, planned: PlannedTensor) -> tuple[QTensor, Diagnostics]:
        """A layer as its method quantizes it."""
        if self._blocks is None:
            units = [unit for unit in self._plan.units if unit.block is not None and unit.block >= (planned.block or 0)]
            self._blocks = ahead(self._solve, units, self._workers)
        while planned.module not in self._ready:
            self._ready = next(self._blocks)
        return self._ready[planned.module][1:]

    def _solve(self, unit: Unit) -> dict[str, Solution]:
        """A block's layers by their names, on the device whose turn it is."""
        recipe = replace(self._recipe, device=self._devices[(unit.block or 0) % len(self._devices)])
        unit = with_common_scales(unit, lambda planned: self._plan.checkpoint.read(planned.info.name))
        choices = {planned.module: [planned.spec] for planned in unit.tensors if planned.spec}
        with current(torch.device(recipe.device)):
            solutions = solve(unit, choices, self._plan, recipe, self._statistics)
            return {solution[0].module: solution for solution in solutions}
