"""Which layers' inputs are left alone, and by what error: against transformers' own forward of the model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bitpress.kernels.activations.int8_tensor import InputCounts, Int8Tensor
from bitpress.kernels.activations.int8_token import Int8Token
from bitpress.pipeline.data.calibration import Calibration
from bitpress.pipeline.errors import ConfigError
from bitpress.pipeline.quantize.inputs import InputError, best_observer, input_errors, with_inputs_kept
from bitpress.pipeline.quantize.plan import make_plan
from bitpress.pipeline.quantize.recipe import Recipe
from bitpress.pipeline.storage.checkpoint import Checkpoint

IDS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))


def errors(folder: Path, **settings: Any) -> tuple[Recipe, list[InputError]]:
    recipe = Recipe.make({"scheme": "int8-dynamic", **settings})
    recipe = replace(recipe, calibration=Calibration("a text", IDS, 0))
    return recipe, input_errors(make_plan(Checkpoint(folder), recipe), recipe)


@torch.no_grad()
def test_the_error_is_that_of_the_blocks_outputs(outliers: Path) -> None:
    """Of each token as a part of its norm, the mean; and of all tokens together."""
    _, measured = errors(outliers, keep_inputs=1.0)
    assert len(measured) == 2 * 4  # q, k and v; o; gate and up; down
    model = AutoModelForCausalLM.from_pretrained(outliers, dtype="float32")
    block = model.model.layers[1]
    outputs: list[Tensor] = []
    block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    model(IDS)
    round_inputs: Callable[[nn.Module, Any], Any] = lambda module, inputs: (Int8Token().apply(inputs[0], {}),)  # noqa: E731
    for part in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
        part.register_forward_pre_hook(round_inputs)
    model(IDS)
    lost, size = (outputs[1] - outputs[0]).square().sum(-1), outputs[0].square().sum(-1)
    expected = (lost / size).mean() + lost.sum() / size.sum()
    own = next(each.error for each in measured if each.unit == "model.layers.1.self_attn.qkv_proj")
    assert own == pytest.approx(expected.item(), rel=1e-3)  # squares of small differences of float32 sums


def test_the_worst_are_kept_and_no_more(outliers: Path) -> None:
    """14 layers: 20% are 2. Of three that servers fuse, none is kept alone."""
    recipe, measured = errors(outliers, keep_inputs=0.2)
    assert [each.unit for each in measured if each.kept] == [f"model.layers.{n}.mlp.down_proj" for n in (0, 1)]
    plan = make_plan(Checkpoint(outliers), recipe)
    kept = with_inputs_kept(plan, recipe, measured)
    schemes = make_plan(Checkpoint(outliers), kept).schemes
    assert [name for name, scheme in schemes.items() if scheme.name == "int8-channel"] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert set(schemes) == set(plan.schemes)


def test_what_a_rule_names_is_left_to_the_rule(outliers: Path) -> None:
    _, measured = errors(outliers, keep_inputs=0.25, layers={"*.down_proj": "int8-dynamic"})
    assert not any("down_proj" in each.unit for each in measured)
    assert sum(len(each.layers) for each in measured if each.kept) <= 3
    assert errors(outliers, keep_inputs=0.05)[1] == []  # not one layer of 14


def test_a_recipe_has_inputs_to_keep() -> None:
    recipe = Recipe.make("int8")
    assert (recipe.name, recipe.keep_inputs, recipe.calibrated) == ("int8", 0.05, True)
    assert Recipe.make({"scheme": "int8-dynamic", "keep_inputs": "5%"}).keep_inputs == 0.05
    with pytest.raises(ConfigError, match="keep_inputs: no scheme of the recipe quantizes inputs"):
        Recipe.make({"scheme": "int4-g128", "keep_inputs": "5%"})
    with pytest.raises(ConfigError, match="keep_inputs: a budget chooses the scheme"):
        Recipe.make({"budget": "4.25 bits", "keep_inputs": "5%"})
    assert "keep_inputs" not in Recipe.make("int8-dynamic").to_dict()


class OneLayer:
    """A block that is one layer, as far as an observer is chosen by it."""

    def __init__(self, inputs: Tensor, weight: Tensor):
        self.inputs, self.weight = inputs, weight

    def tensor(self, name: str) -> Tensor:
        assert name == "down.weight"
        return self.weight

    def error(self, products: dict[str, Callable[[Tensor], Tensor]]) -> float:
        expected = self.inputs @ self.weight.t()
        lost = products["down"](self.inputs) - expected
        return (lost.square().sum() / expected.square().sum()).item()


class Widest(Int8Tensor):
    """Has other observers, which are for those who name them."""

    tried = ("minmax",)


@pytest.mark.parametrize(
    ("activations", "large", "observer"),
    [(Int8Tensor(), 1.0, "mse"), (Int8Tensor(), 100.0, "minmax"), (Widest(), 1.0, "minmax")],
)
def test_the_outputs_choose_the_observer(activations: Int8Tensor, large: float, observer: str) -> None:
    """One input of 262,144 is 20, the others are of the order of 1. The least squared error of inputs cuts it off.

    Where the weights that it meets are large, that is what must not be done.
    """
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(1 << 15, 8, generator=generator), torch.randn(4, 8, generator=generator)
    inputs[7, 0] = 20
    weight[:, 0] *= large
    counts = InputCounts(8, inputs.device)
    counts.add(inputs)
    block: Any = OneLayer(inputs, weight)
    assert best_observer(block, ["down"], activations, {InputCounts: counts}) == observer
