"""One artifact, several schemes and methods: every layer by its own, in memory, reloaded, converted and diagnosed."""

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitpress.kernels.linear import QEmbedding, QLinear
from bitpress.pipeline.api import convert, quantize
from bitpress.pipeline.checkpoints.doctor import diagnose
from bitpress.pipeline.evaluate.results import sizes
from bitpress.pipeline.evaluate.verify import in_memory_logits
from bitpress.pipeline.models.loading import load_model
from bitpress.pipeline.quantize.recipe import Recipe
from bitpress.pipeline.storage.checkpoint import Checkpoint, read_json

CAREFUL = {"*.down_proj": "int8-g32", "model.layers.0.*": "none", "lm_head": "int8-channel"}
RECIPES: dict[str, dict[str, Any]] = {
    "gptq": {"scheme": "int4-g32", "layers": CAREFUL},
    "packed": {"scheme": "int4-g32", "layers": CAREFUL, "format": "compressed-tensors"},
    "packed and plain": {"scheme": "int4-g32-asym", "layers": {"*.down_proj": "int8-dynamic", "lm_head": "int8-g32"}},
    "bitsandbytes": {"scheme": "nf4", "layers": {"model.layers.1.self_attn.*": "none"}},
    "embedding": {"scheme": "int3-g32", "layers": {"*embed_tokens": "int8-g32"}, "format": "compressed-tensors"},
    "fitted": {"scheme": "int4-g128", "fit_groups": True},
    "single layers": {"scheme": "none", "layers": {"*.o_proj": "int4-g32"}},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, save_model: Any, llama_config: Any) -> Callable[[bool], Path]:
    """llama(tied): a float32 checkpoint with its tokenizer. Read only."""
    folder = tmp_path_factory.mktemp("mixed")
    for tied in (False, True):
        save_model(llama_config(tie_word_embeddings=tied), folder / str(tied), torch.float32)
    return lambda tied: folder / str(tied)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def source(request: pytest.FixtureRequest, llama: Callable[[bool], Path]) -> Path:
    return llama(request.param)


def without_head(source: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe as it makes sense for a model whose head is tied: no rule names it."""
    layers = {name: spec for name, spec in recipe.get("layers", {}).items() if name != "lm_head"}
    tied = read_json(source / "config.json").get("tie_word_embeddings")
    return {**recipe, "layers": layers} if tied and "layers" in recipe else recipe


def logits(folder: Path, ids: Tensor) -> Tensor:
    model = load_model(Checkpoint(folder), torch.device("cpu"), "float32", "reference")
    with torch.inference_mode():
        return model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0]


@pytest.mark.parametrize("name", RECIPES)
def test_reloaded_is_what_was_in_memory(name: str, source: Path, tmp_path: Path) -> None:
    recipe, out, ids = without_head(source, RECIPES[name]), tmp_path / "out", torch.arange(3, 35)
    quantize(source, recipe, out)
    expected = in_memory_logits(Checkpoint(source), Recipe.make(recipe), ids, torch.device("cpu"), "float32")
    assert (logits(out, ids) - expected).abs().max() <= 1e-5 * expected.abs().max()
    found = diagnose(out)
    assert found.sound, found.faults


@pytest.mark.parametrize("name", RECIPES)
def test_coverage_agrees_with_a_count_by_hand(name: str, source: Path, tmp_path: Path) -> None:
    recipe, out = without_head(source, RECIPES[name]), tmp_path / "out"
    quantize(source, recipe, out)
    coverage, rules = read_json(out / "bitpress.json")["coverage"], Recipe.make(recipe).rules
    dense, files = Checkpoint(source), Checkpoint(out)
    for layer in coverage["layers"]:
        spec = rules.spec(layer["name"])
        assert spec is not None
        if not recipe.get("fit_groups"):
            assert (layer["scheme"], layer["method"]) == (spec.scheme.name, spec.method.name)
        assert layer["shape"] == list(dense.tensors[f"{layer['name']}.weight"].shape)
        parts = [info for file, info in files.tensors.items() if file.startswith(f"{layer['name']}.")]
        assert layer["bytes"] == sum(info.nbytes for info in parts)
    names = {f"{layer['name']}.weight" for layer in coverage["layers"]} | {each["name"] for each in coverage["kept"]}
    assert names == set(dense.tensors)
    inside = {name: info for name, info in dense.tensors.items() if ".layers." in name}
    done = sum(inside[f"{layer['name']}.weight"].nbytes for layer in coverage["layers"] if ".layers." in layer["name"])
    assert coverage["share"] == pytest.approx(done / sum(info.nbytes for info in inside.values()))
    weights = sum(prod(info.shape) for info in dense.tensors.values())
    bits = sizes(files, coverage, weights)["bits_per_weight"]
    stored = sum(info.nbytes for file, info in files.tensors.items() if ".layers." in file)
    assert bits["decoder"] == pytest.approx(8 * stored / sum(prod(info.shape) for info in inside.values()))
    assert bits["all"] == pytest.approx(8 * sum(file.stat().st_size for file in files.files) / weights)


def test_the_modules_are_what_the_rules_say(llama: Callable[[bool], Path], tmp_path: Path) -> None:
    quantize(llama(False), {**RECIPES["packed"], "layers": {**CAREFUL, "*embed_tokens": "int8-g32"}}, tmp_path / "out")
    model = load_model(Checkpoint(tmp_path / "out"), torch.device("cpu"), "float32", "reference")
    modules = dict(model.named_modules())
    kinds = {name: module for name, module in modules.items() if isinstance(module, QLinear | QEmbedding)}
    assert {name: module.scheme.name for name, module in kinds.items() if "layers.1.mlp" in name} == {
        "model.layers.1.mlp.gate_proj": "int4-g32",
        "model.layers.1.mlp.up_proj": "int4-g32",
        "model.layers.1.mlp.down_proj": "int8-g32",
    }
    assert isinstance(modules["model.layers.0.mlp.down_proj"], nn.Linear)
    assert modules["lm_head"].scheme.name == "int8-channel"
    assert isinstance(modules["model.embed_tokens"], QEmbedding)


def test_gptq_says_it_in_dynamic_and_the_side_file(llama: Callable[[bool], Path], tmp_path: Path) -> None:
    quantize(llama(False), RECIPES["gptq"], tmp_path / "out")
    section = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert section == read_json(tmp_path / "out" / "quantize_config.json")
    assert (section["bits"], section["lm_head"]) == (4, True)
    positive = {pattern: values for pattern, values in section["dynamic"].items() if pattern.startswith("+:")}
    assert {values["bits"] for values in positive.values()} == {8}
    assert any(pattern.startswith("-:") and "layers" in pattern for pattern in section["dynamic"])


def test_conversion_keeps_every_scheme(llama: Callable[[bool], Path], tmp_path: Path) -> None:
    quantize(llama(False), RECIPES["gptq"], tmp_path / "gptq")
    ids = torch.arange(3, 35)
    expected = logits(tmp_path / "gptq", ids)
    for start, to in (("gptq", "gptq-v2"), ("gptq", "compressed-tensors"), ("compressed-tensors", "gptq")):
        out = tmp_path / to if not (tmp_path / to).exists() else tmp_path / "back"
        assert "the same to the bit" in convert(tmp_path / start, to, out).notes[0]
        assert torch.equal(logits(out, ids), expected), (start, to)
    sections = [read_json(tmp_path / name / "config.json")["quantization_config"] for name in ("gptq", "back")]
    assert sections[0]["bits"] == sections[1]["bits"]


def test_methods_side_by_side_in_one_artifact(llama: Callable[[bool], Path], tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("".join(f"{number} bottles of beer on the wall. " for number in range(100, 300)))
    layers = {"*.self_attn.*": "absmax/int8-g32", "*.down_proj": "gptq/int3-g32"}
    calibration = {"text": str(text), "windows": 4, "context": 32}
    recipe = {"method": "gptq", "scheme": "int4-g32", "layers": layers, "calibration": calibration}
    quantize(llama(False), recipe, tmp_path / "out")
    reported = {layer["name"]: layer for layer in read_json(tmp_path / "out" / "bitpress.json")["coverage"]["layers"]}
    kinds = {name.rpartition(".")[2]: (layer["method"], layer["scheme"]) for name, layer in reported.items()}
    assert (kinds["q_proj"], kinds["down_proj"], kinds["up_proj"]) == (
        ("absmax", "int8-g32"),
        ("gptq", "int3-g32"),
        ("gptq", "int4-g32"),
    )
    assert all(("tokens" in layer) == (layer["method"] == "gptq") for layer in reported.values())
    bits = {name: 8 * layer["bytes"] / prod(layer["shape"]) for name, layer in reported.items()}
    assert bits["model.layers.0.mlp.down_proj"] < bits["model.layers.0.mlp.up_proj"] < 8
