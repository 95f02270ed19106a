"""Errors by depth against models whose error is known, and against plain forwards of a real one."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from bitpress.eval.measure import layer_errors
from bitpress.eval.measure.protocols import halves


class Scaled(nn.Linear):
    """A layer whose outputs are too large by a tenth: a relative error of 0.1, in every channel."""

    def forward(self, x):
        return 1.1 * super().forward(x)


def quantized(model, choose=lambda name: True):
    other = copy.deepcopy(model)
    for name, layer in other.named_modules():
        if type(layer) is nn.Linear and "layers" in name and choose(name):
            layer.__class__ = Scaled
    return other


@pytest.fixture(scope="module")
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@pytest.fixture
def windows():
    return halves(torch.randint(256, (3 * 24,), generator=torch.Generator().manual_seed(0)), 24, 0)


def test_a_layers_own_error_is_that_on_the_unquantized_inputs(model, windows):
    errors = layer_errors.output_errors(model, quantized(model), windows, "model.layers")
    names = [name for name, layer in model.named_modules() if type(layer) is nn.Linear and "layers" in name]
    assert [layer["name"] for layer in errors["layers"]] == names
    assert [layer["block"] for layer in errors["layers"]] == [int(name.split(".")[2]) for name in names]
    for layer in errors["layers"]:
        assert layer["output_error"] == pytest.approx(0.1, rel=1e-5)  # float32
        assert [channel["error"] for channel in layer["worst_channels"]] == pytest.approx([0.1] * 3, rel=1e-4)
    assert errors["tokens"] == 72


@torch.inference_mode()
def test_blocks_against_plain_forwards(model, windows):
    """Hidden states of both models, as transformers itself gives them, and each block alone on the first one's."""
    other = quantized(model)
    errors = layer_errors.output_errors(model, other, windows, "model.layers")
    ids = torch.stack([window.ids for window in windows])
    # the last of transformers' hidden states is normed already: the blocks before it are compared
    right, wrong = (m(ids, output_hidden_states=True).hidden_states for m in (model, other))
    for number, block in enumerate(errors["blocks"][:-1]):
        x, y = right[number + 1], wrong[number + 1]
        assert block["cumulative_error"] == pytest.approx(((y - x).norm() / x.norm()).item(), rel=1e-4)
        positions = torch.arange(ids.shape[1]).unsqueeze(0)
        rotary = model.model.rotary_emb(right[number], positions)
        alone = other.model.layers[number](right[number], position_embeddings=rotary)
        assert block["output_error"] == pytest.approx(((alone - x).norm() / x.norm()).item(), rel=1e-4)
    assert [block["block"] for block in errors["blocks"]] == list(range(len(model.model.layers)))


def test_the_first_block_has_nothing_to_inherit(model, windows):
    errors = layer_errors.output_errors(model, quantized(model), windows, "model.layers")["blocks"]
    assert errors[0]["cumulative_error"] == pytest.approx(errors[0]["output_error"], rel=1e-5)
    inherits = layer_errors.output_errors(model, quantized(model, lambda name: ".0." in name), windows, "model.layers")
    assert inherits["blocks"][1]["output_error"] == 0.0
    assert inherits["blocks"][1]["cumulative_error"] > 0.0
    assert {layer["block"] for layer in inherits["layers"]} == {0}


def test_worst_channels_are_named(model, windows):
    other = quantized(model, lambda name: name.endswith("layers.1.mlp.up_proj"))
    layer = other.model.layers[1].mlp.up_proj
    layer.forward = lambda x: nn.functional.linear(x, layer.weight) * (1 + torch.eye(layer.out_features)[7])
    [errors] = layer_errors.output_errors(model, other, windows, "model.layers")["layers"]
    first, *rest = errors["worst_channels"]
    assert (first["channel"], first["share"]) == (7, 1.0)
    assert first["error"] == pytest.approx(1.0, rel=1e-5)
    assert [channel["share"] for channel in rest] == [0.0, 0.0]


def test_a_model_beside_itself(model, windows):
    errors = layer_errors.output_errors(model, copy.deepcopy(model), windows, "model.layers")
    assert errors["layers"] == []
    assert {(b["output_error"], b["cumulative_error"]) for b in errors["blocks"]} == {(0.0, 0.0)}


def test_an_output_of_zeros_has_no_relative_error():
    error = layer_errors._Error()
    error.add(torch.ones(2, 3), torch.zeros(2, 3))
    assert error.relative() is None
    assert [channel["error"] for channel in error.worst()] == [None] * 3
    exact = layer_errors._Error()
    exact.add(torch.zeros(2, 3), torch.ones(2, 3))
    assert exact.relative() == 1.0
    assert math.isclose(sum(channel["share"] for channel in exact.worst()), 1.0)


def test_long_windows_are_cut_and_no_hook_stays(model):
    window = halves(torch.arange(2 * layer_errors.TOKENS) % 256, 2 * layer_errors.TOKENS, 0)
    steps, hooks = [], [len(module._forward_hooks) for module in model.modules()]
    errors = layer_errors.output_errors(
        model, quantized(model), window, "model.layers", lambda *step: steps.append(step)
    )
    assert errors["tokens"] == layer_errors.TOKENS
    assert steps == [(0, 1), (1, 1)]
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
