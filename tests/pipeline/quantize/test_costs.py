"""What quantizing a layer is said to cost, against the KL divergence of a model in which it alone is quantized."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitpress.kernels.qtensor import QTensor
from bitpress.pipeline.quantize.costs import costs_by_gradient
from bitpress.pipeline.quantize.plan import Plan, PlannedTensor, make_plan
from bitpress.pipeline.quantize.recipe import Recipe
from bitpress.pipeline.quantize.spec import LayerSpec
from bitpress.pipeline.storage.checkpoint import Checkpoint

CHOICES = [LayerSpec.parse(f"absmax/{scheme}") for scheme in ("int4-channel", "int8-dynamic", "int3-g32")]


def planned(folder: Path) -> tuple[Checkpoint, Plan]:
    checkpoint = Checkpoint(folder)
    settings = {"method": "absmax", "scheme": "int4-channel", "format": "compressed-tensors", "allow_split_fused": True}
    return checkpoint, make_plan(checkpoint, Recipe.make(settings))


def rounded(checkpoint: Checkpoint, layer: PlannedTensor) -> QTensor:
    assert layer.spec
    weight = layer.turned(checkpoint.read(layer.info.name))
    return layer.spec.method.quantize(weight, layer.spec.scheme, torch.float32, ())[0]


def told(folder: Path, ids: Tensor, tmp_path: Path) -> dict[tuple[str, str], float]:
    """The cost of each layer by each choice."""
    checkpoint, plan = planned(folder)
    read = lambda tensor: checkpoint.read(tensor.info.name)  # noqa: E731
    choices = {layer.module: CHOICES for layer in plan.quantized}
    work, news = tmp_path / "read", []
    found = costs_by_gradient(
        plan,
        choices,
        ids,
        "cpu",
        read,
        lambda layer: rounded(checkpoint, layer),
        work,
        lambda *step: news.append(step),
    )
    costs = {(layer.module, layer.spec.name): cost for layer, cost in found if layer.spec}
    assert news == [(n, 4) for n in range(4)]
    assert not work.exists()
    return costs


@torch.no_grad()
def measured(folder: Path, ids: Tensor) -> dict[tuple[str, str], float]:
    """The mean KL divergence of transformers' model with one layer quantized, weights and inputs."""
    checkpoint, plan = planned(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected, found = model(input_ids=ids).logits.double().log_softmax(-1), {}
    for layer in plan.quantized:
        module = model.get_submodule(layer.module if "lm_head" not in layer.module else "lm_head")
        weight = module.weight.data
        for spec in CHOICES:
            qtensor = rounded(checkpoint, replace(layer, spec=spec))
            module.weight.data = layer.turned(qtensor.dequantize(torch.float32))
            hooks = []
            if activations := spec.scheme.activations:

                def apply(_: Any, inputs: Any, own: Any = activations) -> Any:
                    return (own.apply(inputs[0], {}),)

                hooks.append(module.register_forward_pre_hook(apply))
            got = model(input_ids=ids).logits.double().log_softmax(-1)
            found[layer.module, spec.name] = (expected.exp() * (expected - got)).sum(-1).mean().item()
            module.weight.data = weight
            for hook in hooks:
                hook.remove()
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_costs_are_divergences(name: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    ids = torch.randint(3, 96, (24, 24), generator=torch.Generator().manual_seed(1))
    costs, expected = told(tiny(name), ids, tmp_path), measured(tiny(name), ids)
    assert costs.keys() == expected.keys()
    for key, cost in costs.items():  # v is random: on 24 windows they agree within a fifth
        assert 0.7 < cost / expected[key] < 1.4, key
    assert sum(costs.values()) == pytest.approx(sum(expected.values()), rel=0.1)
