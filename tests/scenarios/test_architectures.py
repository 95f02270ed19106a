"""Every decoder-only architecture is walked by the same code: written, reloaded, and the same as in memory."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitpress.pipeline.api import quantize
from bitpress.pipeline.checkpoints.coverage import coverage_of
from bitpress.pipeline.data.calibration import Calibration
from bitpress.pipeline.errors import CheckpointError, ConfigError
from bitpress.pipeline.evaluate.verify import in_memory_logits
from bitpress.pipeline.models.loading import load_model
from bitpress.pipeline.quantize.recipe import Recipe
from bitpress.pipeline.storage.checkpoint import INDEX, Checkpoint, read_json


def ids() -> torch.Tensor:
    return torch.randint(3, 96, (24,), generator=torch.Generator().manual_seed(1))


def test_experts_are_stored_one_by_one(tiny) -> None:
    names = Checkpoint(tiny("mixtral")).tensors
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in names


@pytest.mark.parametrize("scheme", ["int4-g32", "int8-dynamic", "nf4"])
def test_reloads_as_in_memory(architecture: str, scheme: str, tiny, tmp_path: Path) -> None:
    source = tiny(architecture)
    quantize(source, scheme, tmp_path / "out")
    recipe = Recipe.make(scheme)
    expected = in_memory_logits(Checkpoint(source), recipe, ids(), torch.device("cpu"), "auto")
    model = load_model(Checkpoint(tmp_path / "out"), torch.device("cpu"), "auto", "reference")
    with torch.inference_mode():
        found = model(input_ids=ids().unsqueeze(0)).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # the same weights and operations, in float32


@pytest.mark.parametrize("method", [{}, {"options": {"true_sequential": True}, "scheme": "int3-g32"}])
def test_learned_reloads_as_in_memory(
    architecture: str, method: dict[str, Any], tiny, learn, proved, tmp_path: Path
) -> None:
    """By gptq, against the logits of the very model that it worked on; what it knows of the inputs pays."""
    text = Calibration("a text", torch.randint(3, 96, (16, 16), generator=torch.Generator().manual_seed(2)), 0)
    assert learn(tiny(architecture), tmp_path / "out", calibration=text, **method) == []
    assert proved(tmp_path / "out")["tokens"] == 16
    layers = read_json(tmp_path / "out" / "bitpress.json")["coverage"]["layers"]
    assert all(layer["tokens"] == 256 and 0 < layer["output_error"] < layer["relative_error"] for layer in layers)


def test_is_close_to_the_source_and_says_what_it_kept(architecture: str, tiny, tmp_path: Path) -> None:
    """8-bit weights change little: a layer left out, transposed or swapped would show."""
    source = tiny(architecture)
    quantize(source, "int8-g32", tmp_path / "out")
    dense = AutoModelForCausalLM.from_pretrained(source).eval()
    model = load_model(Checkpoint(tmp_path / "out"), torch.device("cpu"), "auto", "reference")
    with torch.inference_mode():
        expected, found = (m(input_ids=ids().unsqueeze(0)).logits[0] for m in (dense, model))
    assert (found - expected).norm() / expected.norm() < 0.02
    coverage = read_json(tmp_path / "out" / "bitpress.json")["coverage"]
    assert coverage["share"] > 0.85
    assert all(entry["reason"] for entry in coverage["kept"])
    assert {entry["name"] for entry in coverage["kept"]} | {
        f"{layer['name']}.weight" for layer in coverage["layers"]
    } == (set(Checkpoint(source).tensors))


def test_some_experts_may_be_kept(tiny, tmp_path: Path) -> None:
    source = tiny("mixtral")
    layers = {"*.experts.1.*": "none", "*.experts.2.w3": "none"}
    settings = {"scheme": "int4-g32", "layers": layers, "allow_split_fused": True}
    quantize(source, settings, tmp_path / "out")
    recipe = Recipe.make(settings)
    expected = in_memory_logits(Checkpoint(source), recipe, ids(), torch.device("cpu"), "auto")
    model = load_model(Checkpoint(tmp_path / "out"), torch.device("cpu"), "auto", "reference")
    with torch.inference_mode():
        found = model(input_ids=ids().unsqueeze(0)).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", [{}, {"*.experts.0.*": "none"}])
def test_an_expert_that_is_missing_is_refused_not_replaced_by_the_next(
    layers: dict[str, str], tiny, tmp_path: Path
) -> None:
    recipe = {"scheme": "int4-g32", "layers": layers, "allow_split_fused": True}
    quantize(tiny("mixtral"), recipe, tmp_path / "out")
    index = read_json(tmp_path / "out" / INDEX)
    lost = [name for name in index["weight_map"] if "layers.1." in name and ".experts.1." in name]
    (shard,) = {index["weight_map"].pop(name) for name in lost}
    tensors = load_file(tmp_path / "out" / shard)
    save_file({n: t for n, t in tensors.items() if n not in lost}, tmp_path / "out" / shard, {"format": "pt"})
    (tmp_path / "out" / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.experts.gate_up_proj: 6 expert tensors .* expected 8"):
        load_model(Checkpoint(tmp_path / "out"), torch.device("cpu"), "auto", "reference")


def test_experts_in_one_tensor_may_be_kept(tiny, tmp_path: Path) -> None:
    """They stay in one tensor, whether the rule names them or the layers in them."""
    source = shutil.copytree(tiny("mixtral"), tmp_path / "fused")
    model = AutoModelForCausalLM.from_pretrained(source)
    save_file(
        {n: p.detach().clone() for n, p in model.named_parameters()}, source / "model.safetensors", {"format": "pt"}
    )
    rules = {"*.experts.gate_up_proj": "none", "*.experts.*.w2": "none"}
    quantize(source, {"scheme": "int4-g32", "layers": rules}, tmp_path / "out")
    kept = {
        entry["name"]: entry["reason"] for entry in read_json(tmp_path / "out" / "bitpress.json")["coverage"]["kept"]
    }
    for leaf, rule in zip(("gate_up_proj", "down_proj"), rules):
        assert rule in kept[f"model.layers.1.mlp.experts.{leaf}"]
        assert f"model.layers.1.mlp.experts.{leaf}" in Checkpoint(tmp_path / "out").tensors
    assert (
        load_model(Checkpoint(tmp_path / "out"), torch.device("cpu"), "auto")(input_ids=ids()[None])
        .logits.isfinite()
        .all()
    )


def test_the_head_of_a_tied_model_is_not_doubled(tiny, tmp_path: Path) -> None:
    quantize(tiny("gemma"), "int4-g32", tmp_path / "out")
    names = Checkpoint(tmp_path / "out").tensors
    assert "lm_head.weight" not in names
    assert "model.embed_tokens.weight" in names
    model = load_model(Checkpoint(tmp_path / "out"), torch.device("cpu"), "auto")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_only_experts_are_experts(tiny, tmp_path: Path, kept) -> None:
    """Convolutions and decay tables have three dimensions, too: they are kept, with what they are as the reason."""
    quantize(tiny("qwen3_next"), "int4-g32", tmp_path / "out")
    reasons = kept(tmp_path / "out")
    assert reasons["model.layers.0.linear_attn.conv1d.weight"] == "the weight of a Conv1d, not of a linear layer"
    assert reasons["model.layers.0.linear_attn.A_log"] == "a vector"


def test_layers_after_the_blocks_are_carried_over(tiny, learn, kept, copy_of, tmp_path: Path) -> None:
    """MTP layers, which transformers' model leaves out: no blocks, kept, and named so that servers keep them, too."""
    source = copy_of(tiny("glm4_moe"), "mtp")
    tensors = load_file(source / "model.safetensors")
    extra = {n.replace("layers.1.", "layers.2."): w.clone() for n, w in tensors.items() if "layers.1." in n}
    extra["model.layers.2.eh_proj.weight"] = torch.randn(64, 128)
    save_file(tensors | extra, source / "model.safetensors", {"format": "pt"})
    learn(source, tmp_path / "out", format="compressed-tensors")
    assert {each for each in extra if "MTP" in kept(tmp_path / "out").get(each, "")} == set(extra)
    manifest, config = (read_json(tmp_path / "out" / name) for name in ("bitpress.json", "config.json"))
    assert manifest["coverage"]["decoder_bytes"] == sum(w.nbytes for n, w in tensors.items() if ".layers." in n)
    ignored = config["quantization_config"]["ignore"]
    linear = {n.removesuffix(".weight") for n, w in extra.items() if w.dim() == 2 and "gate.weight" not in n}
    assert linear <= set(ignored)
    written = Checkpoint(tmp_path / "out")
    assert all(torch.equal(written.read(name), tensor) for name, tensor in extra.items())
    assert coverage_of(written)["decoder_bytes"] == manifest["coverage"]["decoder_bytes"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "bert is an encoder"),
        ({"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}, "whisper is a speech"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "t5 is an encoder-decoder"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification is a classifier"),
    ],
)
def test_what_does_not_write_text_by_a_decoder_is_refused(
    changes: dict[str, Any], said: str, tiny, copy_of, edit_json, refused_early
) -> None:
    source = copy_of(tiny("llama"), "other")
    edit_json(source / "config.json", **changes)
    assert "give one of these" in refused_early(source, said)


def test_what_a_model_uses_as_more_than_a_layer_is_kept(tiny, kept, tmp_path: Path) -> None:
    """Mamba multiplies by the weight of dt_proj itself; a router that is a subclass of nn.Linear gives more than y."""
    notes = quantize(tiny("mamba"), "int8-dynamic", tmp_path / "mamba").notes
    assert "MambaMixer reads its weight itself (2 layers, such as backbone.layers.0.mixer.dt_proj)" in " ".join(notes)
    assert kept(tmp_path / "mamba")["backbone.layers.0.mixer.dt_proj.weight"] == "MambaMixer reads its weight itself"
    quantize(tiny("phimoe"), "int8-dynamic", tmp_path / "phimoe")
    reasons = kept(tmp_path / "phimoe")
    assert "PhimoeTopKRouter" in next(why for name, why in reasons.items() if name.endswith(".gate.weight")), reasons
    quantize(tiny("hunyuan_v1_moe"), "int8-dynamic", tmp_path / "hunyuan")
    assert kept(tmp_path / "hunyuan")["model.layers.0.mlp.gate.wg.weight"] == "a router or gate"
    for folder in ("mamba", "phimoe", "hunyuan"):
        assert (
            load_model(Checkpoint(tmp_path / folder), torch.device("cpu"), "auto")(ids()[None]).logits.isfinite().all()
        )


@pytest.mark.parametrize(
    ("name", "rule", "said"),
    [
        ("mamba", "*.dt_proj", "MambaMixer reads its weight itself"),
        ("phimoe", "*.gate", "the weight of a PhimoeTopKRouter"),
        ("hunyuan_v1_moe", "*.wg", "HunYuanMoEV1Gate reads its weight itself"),
    ],
)
def test_a_rule_that_names_such_a_layer_is_refused(name: str, rule: str, said: str, tiny, refused_early) -> None:
    message = refused_early(tiny(name), said, ConfigError, layers={rule: "int8-channel"}, scheme="int8-channel")
    assert f"the rule {rule} asks for it" in message
