"""Quantized checkpoints in transformers' own from_pretrained and save_pretrained, on bitpress's kernels."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTQConfig,
    PreTrainedModel,
    TextIteratorStreamer,
    modeling_utils,
    pipeline,
)
from transformers.quantizers import auto

from bitpress.kernels.linear import QLinear
from bitpress.pipeline.api import load, quantize
from bitpress.pipeline.errors import CheckpointError, ConfigError
from bitpress.pipeline.formats import readable
from bitpress.pipeline.models import loading, transformers
from bitpress.pipeline.models.loading import kernels_used
from bitpress.pipeline.objects import Recipe
from bitpress.pipeline.storage.checkpoint import Checkpoint

SCHEMES = {
    "int4-g32": "gptq",
    "int4-g32-asym": "compressed-tensors",
    "int8-dynamic": "compressed-tensors",
    "nf4-dq": "bnb",
}


pytestmark = pytest.mark.usefixtures("registered")


@pytest.fixture(scope="module")
def artifacts(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Scheme -> a checkpoint. Read only."""
    folder = tmp_path_factory.mktemp("artifacts")
    for scheme in SCHEMES:
        quantize(tiny_llama, scheme, folder / scheme)
    return {scheme: folder / scheme for scheme in SCHEMES}


def ids() -> torch.Tensor:
    return torch.randint(3, 96, (1, 24), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=ids()).logits


def bits(folder: Path) -> dict[str, bytes]:
    """Tensor -> its bytes, over all files."""
    found = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in found.items()}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_same_model_as_load_gives(artifacts: dict[str, Path], scheme: str) -> None:
    own, tokenizer = load(artifacts[scheme])
    model = AutoModelForCausalLM.from_pretrained(artifacts[scheme])
    assert model.dtype == own.dtype
    assert kernels_used(model) == kernels_used(own)
    assert torch.equal(logits(model), logits(own))
    inputs = tokenizer("what is it", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    expected = own.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("way", ["load", "from_pretrained"])
def test_saved_again_to_the_bit(artifacts: dict[str, Path], scheme: str, way: str, tmp_path: Path) -> None:
    folder = artifacts[scheme]
    model = load(folder)[0] if way == "load" else AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again", max_shard_size="60KB")
    assert bits(tmp_path / "again") == bits(folder)
    stored, again = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again"))
    assert again["quantization_config"] == stored["quantization_config"]
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")[0]), logits(model))


def test_every_architecture(architecture: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Experts, Conv1D, tied heads, biases, names that transformers changes."""
    quantize(tiny(architecture), "int4-g32", tmp_path / "out")
    checkpoint = Checkpoint(tmp_path / "out")
    own = load_reference(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {name for name, module in model.named_modules() if isinstance(module, QLinear)} == {
        name for name, module in own.named_modules() if isinstance(module, QLinear)
    }
    torch.testing.assert_close(logits(model), logits(own), rtol=0, atol=0)
    own.save_pretrained(tmp_path / "again")
    assert bits(tmp_path / "again") == bits(tmp_path / "out")


def load_reference(checkpoint: Checkpoint) -> PreTrainedModel:
    from bitpress.pipeline.models.loading import load_model

    return load_model(checkpoint, torch.device("cpu"), "auto")


def test_some_experts_may_be_kept(tiny: Callable[..., Path], tmp_path: Path) -> None:
    layers = {"*.experts.1.*": "none", "*.experts.2.w3": "none"}
    recipe = {"scheme": "int4-g32", "layers": layers, "allow_split_fused": True}
    quantize(tiny("mixtral"), recipe, tmp_path / "out")
    own = load_reference(Checkpoint(tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(model), logits(own))
    model.save_pretrained(tmp_path / "again")
    assert bits(tmp_path / "again") == bits(tmp_path / "out")


def test_pipelines_and_streaming(artifacts: dict[str, Path]) -> None:
    folder = artifacts["int4-g32"]
    model, tokenizer = load(folder)
    given = {"max_new_tokens": 6, "do_sample": False}
    (made,) = pipeline("text-generation", model=str(folder))("what is it", **given)
    inputs = tokenizer("what is it", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    streamer = TextIteratorStreamer(tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    loaded.generate(**inputs, **given, streamer=streamer)
    expected = tokenizer.decode(model.generate(**inputs, **given)[0])
    assert made["generated_text"] == "".join(streamer) == expected


def test_other_dtypes(artifacts: dict[str, Path]) -> None:
    own, _ = load(artifacts["int4-g32"], dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(artifacts["int4-g32"], dtype=torch.float32)
    assert torch.equal(logits(model), logits(own))


def test_layers_run_where_a_device_map_puts_them(artifacts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the first GPU all of them, which is accelerate's default. Two names of one device, as there may be no
    other; accelerate itself cannot tell them apart, and so is not called."""
    here, there = (
        ("model.embed_tokens", "model.rotary_emb", "model.layers.0"),
        ("model.layers.1", "model.norm", "lm_head"),
    )
    places = dict.fromkeys(here, "cpu") | dict.fromkeys(there, "cpu:0")
    dispatched: list[Any] = []
    monkeypatch.setattr(
        modeling_utils, "accelerate_dispatch", lambda model, *_: setattr(model, "hf_device_map", places)
    )
    monkeypatch.setattr(
        transformers, "dispatch_model", lambda model, *given, **named: dispatched.append((given, named))
    )
    model = AutoModelForCausalLM.from_pretrained(artifacts["int4-g32"], device_map=places)
    assert dispatched == [((places,), {"main_device": "cpu"})]
    monkeypatch.setattr(
        loading, "optimize_for_decoding", lambda *arguments: None
    )  # layers of several devices do not fuse
    own, _ = load(artifacts["int4-g32"])
    assert torch.equal(logits(model), logits(own))
    assert not hasattr(model, "fusing")


def test_device_maps_count_packed_bytes(artifacts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerate splits by is what layers take, not what they would take unquantized."""
    sizes = {}

    def look(self: Any, model: PreTrainedModel, **given: Any) -> None:
        before(self, model, **given)
        layer = model.get_submodule("model.layers.0.mlp.up_proj")
        sizes["up_proj"] = sum(buffer.nbytes for buffer in layer.buffers())

    before = transformers.BitpressQuantizer._process_model_before_weight_loading
    monkeypatch.setattr(transformers.BitpressQuantizer, "_process_model_before_weight_loading", look)
    AutoModelForCausalLM.from_pretrained(artifacts["int4-g32"])
    stored = Checkpoint(artifacts["int4-g32"]).tensors
    assert sizes["up_proj"] == sum(t.nbytes for n, t in stored.items() if n.startswith("model.layers.0.mlp.up_proj."))
    assert sizes["up_proj"] < 128 * 64 * 2 / 3


def test_the_disk_is_no_place_for_quantized_layers(artifacts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="on the disk"):
        AutoModelForCausalLM.from_pretrained(
            artifacts["int4-g32"], device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=tmp_path
        )


def test_a_tampered_layer_is_refused(
    artifacts: dict[str, Path], copy_of: Callable[..., Path], edit_tensors: Any
) -> None:
    folder = copy_of(artifacts["int4-g32"])
    name = "model.layers.0.mlp.up_proj.scales"
    (file,) = (file for file in folder.glob("*.safetensors") if name in load_file(file))
    edit_tensors(file, lambda tensors: tensors[name].fill_(torch.nan))
    with pytest.raises(CheckpointError, match=r"layers.0.mlp.up_proj: scales has"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_saving_needs_the_files(artifacts: dict[str, Path], copy_of: Callable[..., Path], tmp_path: Path) -> None:
    """Quantized weights are not kept in memory as they are in the files."""
    folder = copy_of(artifacts["int4-g32"], "source")
    model, _ = load(folder)
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=f"{file.name} changed"):
        model.save_pretrained(tmp_path / "again")
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="no longer there"):
        model.save_pretrained(tmp_path / "again")
    assert not list((tmp_path / "again").glob("*.safetensors"))


def test_a_folder_may_be_saved_over_itself(artifacts: dict[str, Path], copy_of: Callable[..., Path]) -> None:
    folder = copy_of(artifacts["int4-g32"], "source")
    model, _ = load(folder)
    expected = bits(folder)
    model.save_pretrained(folder)
    assert bits(folder) == expected


@pytest.mark.parametrize(
    "stored",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "dynamic": {"+:.*": {"bits": 5}}},
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "checkpoint_format": "marlin"},
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"quant_method": "awq", "bits": 4},
        {},
    ],
)
def test_what_bitpress_does_not_read_is_left_to_others(stored: dict[str, Any]) -> None:
    assert not readable(stored)


def test_others_get_the_config_that_they_would_have_got() -> None:
    stored = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
    assert isinstance(auto.AutoQuantizationConfig.from_dict(stored), transformers.BitpressConfig)
    mixed = stored | {"dynamic": {"+:.*down.*": {"bits": 5}}}
    assert type(auto.AutoQuantizationConfig.from_dict(mixed)) is GPTQConfig


@pytest.mark.parametrize("recipe", ["int4-g32", "smooth+int8-dynamic"])
def test_quantized_on_the_way(tiny_llama: Path, tmp_path: Path, recipe: str) -> None:
    """By the same code: the weights that a transform changes come from the artifact, too."""
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 40)
    calibration = {"text": str(tmp_path / "text.txt"), "windows": 4, "context": 32}
    settings = Recipe(recipe, **({"calibration": calibration} if "smooth" in recipe else {}))
    config = transformers.BitpressConfig(settings)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)
    quantize(tiny_llama, settings, tmp_path / "own")
    own = load(tmp_path / "own").model
    assert torch.equal(logits(model), logits(own))
    assert torch.get_default_dtype() is torch.float32
    model.save_pretrained(tmp_path / "saved")
    assert bits(tmp_path / "saved") == bits(tmp_path / "own")


def test_a_recipe_that_is_wrong_is_said_at_once(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="sheme: unknown key"):
        transformers.BitpressConfig({"sheme": "int4-g32"})
    with pytest.raises(ConfigError, match="is not quantized; give a recipe"):
        AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=transformers.BitpressConfig())
