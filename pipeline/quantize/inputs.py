"""Finds the layers whose inputs are worth leaving alone: a few make most of what rounding inputs costs.

Trained models have massive activations: some tokens carry a few numbers thousands of times larger than the others, and
so do the inputs of a few down projections (arXiv 2402.17762). 8 bits cannot hold both. Where smoothing does not help
either, such a layer keeps its weights' codes and gets its inputs as they are. It is then an ordinary layer of another
scheme, which every format and runtime knows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bitpress.kernels.activations.base import Activations

from ..formats.names import fused_unit
from ..system.progress import OnStep
from .block_runner import BlockRunner, BlockView
from .plan import Plan, PlannedTensor, patterns
from .recipe import Recipe
from .spec import LayerSpec, Rules

# Calibration tokens that blocks are judged on. On SmolLM2-135M the errors on 512 told what each layer's inputs cost in
# KL within a factor of three, from 0.00002 to 0.004.
_TOKENS = 1024


@dataclass(frozen=True)
class InputError:
    """What rounding the inputs of layers that servers fuse does to their block.

    layers: their names in the files. error: see BlockView.error; nothing else of the block is rounded.
    kept: whether these inputs are left alone.
    """

    unit: str
    layers: tuple[str, ...]
    error: float
    kept: bool = False


@torch.no_grad()
def input_errors(plan: Plan, recipe: Recipe, on_step: OnStep = lambda done, total: None) -> list[InputError]:
    """Each unit whose inputs the recipe rounds and no rule names, and what that costs; the worst ones are `kept`.

    The unquantized model goes through a few calibration windows in float32, block by block, each transformed as the
    recipe says. At most the recipe's share of all layers with rounded inputs is kept, a unit as a whole or not at all.

    Args:
        on_step: called with (blocks done, blocks in all).
    Raises:
        NumericsError: weights or inputs that are not finite.
    """
    assert recipe.calibration
    units: dict[str, list[PlannedTensor]] = {}
    for planned in plan.quantized:
        rounded = planned.spec and planned.spec.scheme.activations
        if rounded and planned.block is not None and recipe.rules.pattern(planned.info.name) is None:
            units.setdefault(fused_unit(planned.module), []).append(planned)
    room = int(recipe.keep_inputs * sum(map(len, units.values())) + 1e-9)  # 5% of 20 layers is 1
    if not room:
        return []
    ids = recipe.calibration.ids
    outside = [replace(planned, spec=None) for planned in plan.tensors if planned.block is None]
    windows = ids[: max(1, _TOKENS // ids.shape[1])]
    runner = BlockRunner(plan.checkpoint, outside, windows, torch.float32, recipe.device)
    errors = []
    for unit, weights, inputs in runner.blocks_in_memory(plan.units, on_step):
        view = BlockView(runner, unit.tensors, weights, partial(iter, inputs))
        if recipe.transform:
            recipe.transform.transform(view)
        products = _products(view, recipe.observer)
        for name, layers in units.items():
            own = {planned.module: products[planned.module] for planned in layers if planned.module in products}
            if layers[0].block == unit.block and own:
                errors.append(InputError(name, tuple(planned.module for planned in layers), view.error(own)))
    kept = set()
    for each in sorted(errors, key=lambda each: each.error / len(each.layers), reverse=True):
        if len(each.layers) <= room:
            room -= len(each.layers)
            kept.add(each.unit)
    return [replace(each, kept=each.unit in kept) for each in errors]


def _products(block: BlockView, observer: str | None) -> dict[str, Callable[[Tensor], Tensor]]:
    """Layer -> its inputs rounded as its scheme says, times its weight as it is; see BlockView.error."""
    schemes = {layer: scheme for group in block.groups for layer in group.layers if (scheme := block.scheme(layer))}
    wanted = {kind for scheme in schemes.values() if scheme.static for kind in scheme.static.statistics}
    static = {kind: block.collect(kind) for kind in wanted}
    products = {}
    for number, group in enumerate(block.groups):
        types = {scheme.activations: 0 for layer in group.layers if (scheme := schemes.get(layer))}
        for activations in types:
            if activations is None:
                continue
            layers = [name for name in group.layers if name in schemes and schemes[name].activations == activations]
            own: dict[str, Tensor] = {}
            if not activations.dynamic:
                seen = {kind: static[kind][number] for kind in activations.statistics}
                if not all(each.tokens for each in seen.values()):
                    continue  # an expert that no token reaches
                own = activations.tensors(seen, observer or best_observer(block, layers, activations, seen))
            for layer in layers:
                products[layer] = _product(activations, own, block.tensor(f"{layer}.weight").to(torch.float32))
    return products


@torch.no_grad()
def best_observer(
    block: BlockView, layers: Sequence[str], activations: Activations, statistics: Mapping[type, Any]
) -> str:
    """The observer, of those that are tried, by which rounding the inputs of some layers, and nothing else, moves the
    block's outputs least.

    One for all layers: they read one input, and servers fuse them.

    Args:
        layers: their names in the files. activations: static ones. statistics: of these inputs.
    """

    weights = {layer: block.tensor(f"{layer}.weight").to(torch.float32) for layer in layers}

    def error(observer: str) -> float:
        own = activations.tensors(statistics, observer)
        return block.error({layer: _product(activations, own, weight) for layer, weight in weights.items()})

    return min(activations.tried, key=error)


def _product(activations: Activations, own: Mapping[str, Tensor], weight: Tensor) -> Callable[[Tensor], Tensor]:
    """What a layer makes of its inputs when these alone are rounded."""

    def product(x: Tensor) -> Tensor:
        stored = {name: tensor.to(x.device) for name, tensor in own.items()}
        return activations.apply(x, stored) @ weight.to(x.device).t()

    return product


def with_inputs_kept(plan: Plan, recipe: Recipe, errors: Sequence[InputError]) -> Recipe:
    """The recipe with a rule for each layer whose inputs are left alone."""
    kept = {name for each in errors if each.kept for name in each.layers}
    units: dict[str, list[PlannedTensor]] = {}
    for planned in plan.quantized:
        if planned.module in kept:
            units.setdefault(fused_unit(planned.module), []).append(planned)
    own: dict[str, LayerSpec] = {}
    for name, layers in units.items():
        spec = layers[0].spec
        assert spec
        own |= dict.fromkeys(patterns(name, layers), spec.with_inputs_alone())
    return replace(recipe, rules=Rules(recipe.rules.default, own | dict(recipe.rules.layers)), keep_inputs=0.0)
