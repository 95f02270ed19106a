"""What quantizing a layer is estimated to cost, against the KL divergence of a model in which it alone is quantized."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitpress.kernels.qtensor import QTensor
from bitpress.pipeline.errors import NumericsError
from bitpress.pipeline.quantize.costs import costs_by_gradient
from bitpress.pipeline.quantize.plan import Plan, PlannedTensor, make_plan
from bitpress.pipeline.quantize.recipe import Recipe
from bitpress.pipeline.quantize.spec import LayerSpec
from bitpress.pipeline.storage.checkpoint import Checkpoint

IDS = torch.randint(3, 96, (24, 24), generator=torch.Generator().manual_seed(1))
Tiny = Callable[..., Path]


def planned(folder: Path) -> tuple[Checkpoint, Plan]:
    checkpoint = Checkpoint(folder)
    settings = {"method": "absmax", "scheme": "int4-channel", "format": "compressed-tensors", "allow_split_fused": True}
    return checkpoint, make_plan(checkpoint, Recipe.make(settings))


def rounded(checkpoint: Checkpoint, layer: PlannedTensor) -> QTensor:
    assert layer.spec
    weight = layer.turned(checkpoint.read(layer.info.name))
    return layer.spec.method.quantize(weight, layer.spec.scheme, torch.float32, ())[0]


def estimated(folder: Path, choices: list[LayerSpec], work: Path) -> dict[tuple[str, str], float]:
    """The cost of each layer by each choice."""
    checkpoint, plan = planned(folder)
    news: list[tuple[int, int]] = []
    found = costs_by_gradient(
        plan,
        {layer.module: choices for layer in plan.quantized},
        IDS,
        "cpu",
        lambda tensor: checkpoint.read(tensor.info.name),
        lambda layer: rounded(checkpoint, layer),
        work,
        lambda *step: news.append(step),
    )
    costs = {(layer.module, layer.spec.name): cost for layer, cost in found if layer.spec}
    assert news == [(n, 4) for n in range(4)]
    assert not work.exists()
    return costs


@torch.no_grad()
def divergence(model: Any, other: Any) -> float:
    """Of another model's next tokens from a model's, the mean over tokens, in nats."""
    p, q = (each(input_ids=IDS).logits.double().log_softmax(-1) for each in (model, other))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_cost_of_a_layer_is_the_divergence_of_a_model_with_it(name: str, tiny: Tiny, tmp_path: Path) -> None:
    """Of transformers' own, with nothing but the layer quantized, weights and inputs."""
    checkpoint, plan = planned(tiny(name))
    choices = [LayerSpec.parse(f"absmax/{scheme}") for scheme in ("int3-g32", "int4-channel", "int8-dynamic")]
    costs = estimated(tiny(name), choices, tmp_path / "read")
    model, other = (AutoModelForCausalLM.from_pretrained(tiny(name), dtype=torch.float32) for _ in range(2))
    expected = {}
    for layer in plan.quantized:
        module = other.get_submodule(layer.module)
        weight = module.weight.data
        for spec in choices:
            activations = spec.scheme.activations
            module.weight.data = layer.turned(rounded(checkpoint, replace(layer, spec=spec)).dequantize(torch.float32))
            if activations is not None:
                apply = partial(activations.apply, tensors={})
                hook = module.register_forward_pre_hook(lambda _, inputs, apply=apply: (apply(inputs[0]),))
            expected[layer.module, spec.name] = divergence(model, other)
            if activations is not None:
                hook.remove()
        module.weight.data = weight
    assert costs.keys() == expected.keys()
    for key, cost in costs.items():  # what is drawn makes a fifth of difference on so little text
        assert 0.7 < cost / expected[key] < 1.4, key


def test_costs_add_up_to_the_divergence_of_all(
    architecture: str, tiny: Tiny, copy_of: Callable[..., Path], tmp_path: Path
) -> None:
    folder, spec = tiny(architecture), LayerSpec.parse("absmax/int4-channel")
    checkpoint, plan = planned(folder)
    costs = estimated(folder, [spec], tmp_path / "read")
    quantized = copy_of(folder, "quantized")
    tensors = load_file(quantized / "model.safetensors")
    for layer in plan.quantized:
        weight = rounded(checkpoint, replace(layer, spec=spec)).dequantize(torch.float32)
        tensors[layer.info.name] = layer.turned(weight).contiguous()
    save_file(tensors, quantized / "model.safetensors", {"format": "pt"})
    own = (AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32) for each in (folder, quantized))
    assert sum(costs.values()) == pytest.approx(divergence(*own), rel=0.25)


def test_a_cost_that_is_no_number_is_refused(tiny: Tiny, copy_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy_of(tiny("llama"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] *= 1e38  # logits overflow, what blocks read does not
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(NumericsError, match="costs is NaN or infinite on the calibration text"):
        estimated(folder, [LayerSpec.parse("absmax/int4-channel")], tmp_path / "read")
