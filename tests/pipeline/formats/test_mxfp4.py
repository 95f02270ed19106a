"""gpt-oss in its own layout: what transformers makes of it, and the way to other formats and back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from bitpress.pipeline.api import convert, load, quantize
from bitpress.pipeline.checkpoints.doctor import diagnose
from bitpress.pipeline.errors import CheckpointError, ConfigError
from bitpress.pipeline.formats import open_quantized
from bitpress.pipeline.storage.checkpoint import INDEX, read_json

SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256,
    "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 3, "num_experts_per_tok": 2,
}  # fmt: skip
RECIPE = {"scheme": "none", "layers": {"*.experts.*": "mxfp4"}, "format": "mxfp4"}
EXPERTS = "model.layers.0.mlp.experts"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory, save_model: Callable[..., Path]) -> Path:
    return save_model(AutoConfig.for_model("gpt_oss", **SHAPE), tmp_path_factory.mktemp("models") / "gpt-oss")


@pytest.fixture(scope="module")
def artifact(gpt_oss: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    out = tmp_path_factory.mktemp("artifacts") / "mxfp4"
    quantize(gpt_oss, RECIPE, out)
    return out


def stored(folder: Path) -> Tensors:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_transformers_computes_the_same(artifact: Path) -> None:
    """It dequantizes the weights where there is no GPU; in bfloat16 each of them is exact."""
    assert {name: list(tensor.shape) for name, tensor in stored(artifact).items() if name.startswith(EXPERTS)} == {
        f"{EXPERTS}.gate_up_proj_blocks": [3, 192, 2, 16],
        f"{EXPERTS}.gate_up_proj_scales": [3, 192, 2],
        f"{EXPERTS}.gate_up_proj_bias": [3, 192],
        f"{EXPERTS}.down_proj_blocks": [3, 64, 3, 16],
        f"{EXPERTS}.down_proj_scales": [3, 64, 3],
        f"{EXPERTS}.down_proj_bias": [3, 64],
    }
    ids = torch.arange(24).unsqueeze(0)
    ours, _ = load(artifact, dtype="bfloat16", kernel="reference")
    theirs = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.bfloat16)
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)


def test_doctor_and_the_way_to_another_format_and_back(artifact: Path, tmp_path: Path) -> None:
    found = diagnose(artifact)
    assert found.sound, found.faults
    assert (found.what["quantized"], found.what["quantized layers"]) == ("mxfp4", 18)
    assert found.runtimes["transformers"]["loads"] == found.runtimes["vLLM"]["loads"] == "yes"
    convert(artifact, "compressed-tensors", tmp_path / "there")
    assert diagnose(tmp_path / "there").runtimes["transformers"]["loads"] == "no"
    convert(tmp_path / "there", "mxfp4", tmp_path / "back")
    before, after = stored(artifact), stored(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"scheme": "mxfp4", "format": "mxfp4"}, "holds experts alone, and .* scheme none, and a rule"),
        ({**RECIPE, "layers": {"*.experts.*": "nvfp4"}}, "holds the experts of gpt-oss as mxfp4, not nvfp4"),
    ],
)
def test_what_has_no_place_is_refused(gpt_oss: Path, tmp_path: Path, recipe: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        quantize(gpt_oss, recipe, tmp_path / "out")


def test_other_models_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="and this is the model type 'llama'"):
        quantize(tiny_llama, {"scheme": "mxfp4", "format": "mxfp4"}, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, n: t.pop(f"{n}_scales"), "gate_up_proj_scales is missing, which belongs to"),
        (lambda t, n: t.pop(f"{n}_blocks"), "gate_up_proj_blocks is missing, which belongs to"),
        (lambda t, n: t.update({f"{n}_scales": t[f"{n}_scales"][:1].clone()}), "has shape [1, 192, 2], expected"),
        (lambda t, n: t.update({f"{n}_blocks": t[f"{n}_blocks"].flatten(2)}), "expected [experts, out, in"),
        (lambda t, n: t.update({f"{n}_scales": t[f"{n}_scales"].float()}), "expected uint8"),
        (lambda t, n: t[f"{n}_scales"].fill_(255), "experts.0.gate_proj: 192 scales are 255, which is NaN"),
        (lambda t, n: t.update({f"{n}_blocks": t[f"{n}_blocks"][:, :190].clone()}), "shape"),
        (lambda t, n: t.update({f"{n}_bias": t[f"{n}_bias"][:, :-2].clone()}), "gate_up_proj_bias"),
    ],
)
def test_damage_is_named(
    artifact: Path,
    copy_of: Callable[..., Path],
    edit_tensors: Callable[..., None],
    change: Callable[..., Any],
    said: str,
) -> None:
    folder = copy_of(artifact)
    index = read_json(folder / INDEX)["weight_map"]
    file = folder / index[f"{EXPERTS}.gate_up_proj_blocks"]
    edit_tensors(file, lambda tensors: change(tensors, f"{EXPERTS}.gate_up_proj"))
    names = {name: path.name for path in folder.glob("*.safetensors") for name in load_file(path)}
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError) as caught:
        load(folder, kernel="reference")
    assert said in str(caught.value), str(caught.value)


def test_a_published_one_is_read_as_it_lies(artifact: Path) -> None:
    checkpoint = open_quantized(artifact)
    assert checkpoint.dequantization is None
    one = checkpoint.read(f"{EXPERTS}.1.up_proj.blocks")
    assert torch.equal(one, stored(artifact)[f"{EXPERTS}.gate_up_proj_blocks"][1, 1::2])
    (rows,) = checkpoint.read_rows(f"{EXPERTS}.1.up_proj.blocks", [3], first=2)
    assert torch.equal(rows, one[2:5])
