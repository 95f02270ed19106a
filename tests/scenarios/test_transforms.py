"""Smoothing and scaling before quantization: less error, the same files, the same bytes after a crash."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitpress.pipeline.checkpoints.doctor import diagnose
from bitpress.pipeline.config.schema import recipe_parts
from bitpress.pipeline.errors import ConfigError
from bitpress.pipeline.models.loading import load_model
from bitpress.pipeline.quantize.recipe import Recipe
from bitpress.pipeline.storage.checkpoint import Checkpoint, read_json

Learn = Callable[..., list[str]]
IDS = torch.arange(3, 67).unsqueeze(0)


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


@pytest.mark.parametrize(
    ("text", "keep_inputs"),
    [("awq+gptq/int4-g32", 0.0), ("smooth+gptq/int8-dynamic", 0.2), ("smooth+int8-static", 0.2)],
)
def test_reloaded_it_is_the_model_that_was_in_memory(
    text: str, keep_inputs: float, outliers: Path, tmp_path: Path, learn: Learn, proved: Any
) -> None:
    learn(outliers, tmp_path / "out", **recipe_parts(text), keep_inputs=keep_inputs)
    found = proved(tmp_path / "out", "bfloat16")
    assert (found["tokens"], found["max_difference"]) == (16, 0)
    schemes = {layer["scheme"] for layer in read_json(tmp_path / "out" / "bitpress.json")["coverage"]["layers"]}
    assert schemes == {text.rpartition("/")[2].removeprefix("smooth+"), *(["int8-channel"] if keep_inputs else [])}
    assert diagnose(tmp_path / "out").faults == []


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
