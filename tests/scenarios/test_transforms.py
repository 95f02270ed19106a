"""Smoothing and scaling before quantization: less error, the same files, the same bytes after a crash."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitpress.pipeline.checkpoints.doctor import diagnose
from bitpress.pipeline.errors import ConfigError
from bitpress.pipeline.models.loading import load_model
from bitpress.pipeline.quantize.recipe import Recipe
from bitpress.pipeline.storage.checkpoint import Checkpoint, read_json

Learn = Callable[..., list[str]]
IDS = torch.arange(3, 67).unsqueeze(0)


@pytest.fixture
def outliers(tiny: Callable[..., Path], copy_of: Callable[..., Path]) -> Path:
    """A Llama some of whose channels are 64 times larger between its layers, and which computes what the plain one
    does."""
    folder = copy_of(tiny("llama"))
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    wide = torch.ones(128).index_fill_(0, torch.tensor([3, 77]), 64.0)
    for block in range(2):
        names = {
            name: f"model.layers.{block}.{name}.weight" for name in ("input_layernorm", "mlp.up_proj", "mlp.down_proj")
        }
        tensors[names["input_layernorm"]] *= wide[:64]
        for name in "qkv":
            tensors[f"model.layers.{block}.self_attn.{name}_proj.weight"] /= wide[:64]
        tensors[names["mlp.up_proj"]] *= wide[:, None]
        tensors[names["mlp.down_proj"]] /= wide
    save_file(
        {name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


@torch.inference_mode()
def error(out: Path, source: Path) -> float:
    """The relative error of an artifact's logits."""
    expected = AutoModelForCausalLM.from_pretrained(source, dtype="float32")(IDS).logits
    logits = load_model(Checkpoint(out), torch.device("cpu"), "float32", "reference")(IDS).logits
    return ((logits - expected).norm() / expected.norm()).item()


def test_smoothing_takes_the_outliers_out_of_the_inputs(outliers: Path, tmp_path: Path, learn: Learn) -> None:
    """All that INT8 loses by them: the error is that of a model without."""
    learn(outliers, tmp_path / "plain", scheme="int8-dynamic", method="absmax")
    learn(outliers, tmp_path / "smooth", scheme="int8-dynamic", method="absmax", transform="smooth")
    assert error(tmp_path / "smooth", outliers) < 0.2 * error(tmp_path / "plain", outliers)
    lines = read_json(tmp_path / "smooth" / "bitpress.json")["transform"]
    assert len(lines) == 8  # two blocks of four groups
    assert all(line["after"] <= line["before"] for line in lines)


@pytest.mark.parametrize("recipe", [("awq", "gptq", "int4-g32"), ("smooth", "gptq", "int8-dynamic")], ids="+".join)
def test_a_broken_run_ends_in_the_same_bytes(
    recipe: tuple[str, str, str], outliers: Path, tmp_path: Path, learn: Learn
) -> None:
    transform, method, scheme = recipe
    settings = {"transform": transform, "method": method, "scheme": scheme}
    learn(outliers, tmp_path / "whole", **settings)

    def stop(done: int, total: int) -> None:
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(outliers, tmp_path / "broken", stop, **settings)
    learn(outliers, tmp_path / "broken", **settings)
    whole, broken = (read_json(tmp_path / name / "bitpress.json") for name in ("whole", "broken"))
    assert whole == broken


def test_a_recipe_names_its_transform() -> None:
    recipe = Recipe.make("smooth+gptq/int8-dynamic")
    assert recipe.name == "smooth-gptq-int8-dynamic"
    assert recipe.calibrated
    assert recipe.to_dict()["transform"] == "smooth"
    assert Recipe.make("smooth+int8-dynamic").method == "absmax"
    with pytest.raises(ConfigError, match="transform 'smoth' is unknown; did you mean smooth"):
        Recipe.make("smoth+int8-dynamic")


@pytest.mark.parametrize("scheme", ["int8-static", "int8-static-asym"])
def test_static_inputs_are_calibrated_and_stored(scheme: str, outliers: Path, tmp_path: Path, learn: Learn) -> None:
    out = tmp_path / "static"
    learn(outliers, out, scheme=scheme, transform="smooth", method="absmax")
    assert error(out, outliers) < 0.2  # one scale for all inputs of a random model
    diagnosis = diagnose(out)
    assert diagnosis.faults == []
    stored = {
        name: info.shape
        for name, info in Checkpoint(out).tensors.items()
        if name.endswith(("input_scale", "zero_point"))
    }
    assert len(stored) == (14 if scheme == "int8-static" else 28)
    assert set(stored.values()) == {(1,)}
    learn(outliers, tmp_path / "clipped", scheme=scheme, observer="percentile", method="absmax")
    with pytest.raises(ConfigError, match="calibrates inputs, and only those of the decoder blocks are seen"):
        learn(outliers, tmp_path / "head", scheme=scheme, layers={"lm_head": scheme})


def test_an_observer_needs_static_inputs() -> None:
    with pytest.raises(ConfigError, match="observer 'mode' is unknown to int8-static"):
        Recipe.make({"scheme": "int8-static", "observer": "mode"})
    with pytest.raises(ConfigError, match="no scheme of the recipe has static inputs"):
        Recipe.make({"scheme": "int8-dynamic", "observer": "mse"})
