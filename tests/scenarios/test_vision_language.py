"""Vision-language models: the text decoder is quantized inside the whole checkpoint, the tower stays as it is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

from bitpress.pipeline.api import convert, quantize
from bitpress.pipeline.checkpoints.doctor import diagnose
from bitpress.pipeline.models.loading import load_model
from bitpress.pipeline.models.quantized import read_quantized
from bitpress.pipeline.models.stored_layer import read_layer
from bitpress.pipeline.models.structure import auto_class, decoder, skeleton, towers
from bitpress.pipeline.publish.usage import usage_snippets
from bitpress.pipeline.storage.checkpoint import Checkpoint, read_json

TEXT: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
# larger than the decoder: its blocks must not be taken for the decoder's
TOWER: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
MROPE = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [2, 3, 3]}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl": (
        "Qwen2VLConfig",
        {
            "text_config": TEXT | {"rope_parameters": MROPE},
            "vision_config": {"depth": 2, "embed_dim": 128, "hidden_size": 64, "num_heads": 4, "patch_size": 8},
            "image_token_id": 90,
            "video_token_id": 91,
        },
    ),
    "gemma3": (
        "Gemma3Config",
        {"text_config": TEXT | {"sliding_window": 8}, "vision_config": TOWER, "image_token_index": 90},
    ),
    "llava": (
        "LlavaConfig",
        {
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": TOWER | {"model_type": "clip_vision_model", "projection_dim": 64, "vocab_size": 96},
            "image_token_index": 90,
        },
    ),
    "mllama": (
        "MllamaConfig",
        {
            "text_config": {key: value for key, value in TEXT.items() if key != "head_dim"}
            | {"num_hidden_layers": 3, "cross_attention_layers": [1]},
            "vision_config": {
                "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_global_layers": 1,
                "attention_heads": 4, "image_size": 16, "patch_size": 8, "vision_output_dim": 128,
                "intermediate_layers_indices": [0], "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]],
            },
            "image_token_index": 90,
        },
    ),
    # its files hold q, k and v of the tower as one weight, which transformers cuts into three
    "qianfan_ocr": (
        "QianfanOCRConfig",
        {
            "text_config": TEXT | {"model_type": "qwen3"},
            "vision_config": TOWER | {"image_size": [16, 16], "patch_size": [8, 8]},
            "image_token_id": 90,
        },
    ),
}  # fmt: skip


def ids() -> Tensor:
    return torch.randint(3, 90, (1, 24), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    return model(input_ids=ids(), use_cache=False).logits


@pytest.fixture(scope="session")
def vision_language(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """vision_language(name): the folder of a whole model in float32, as transformers saves it. Read only."""
    from checkpoints import save_tokenizer  # of tests/fixtures, which pytest imports itself

    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            kind, settings = MODELS[name]
            with torch.random.fork_rng():
                torch.manual_seed(7)
                model = AutoModelForImageTextToText.from_config(getattr(transformers, kind)(**settings)).float()
                for parameter in model.parameters():  # biases and norms start as constants, which hide mistakes
                    parameter.data += 0.05 * torch.randn_like(parameter)
            folders[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(folders[name])
            save_tokenizer(folders[name])
        return folders[name]

    return make


@pytest.fixture(params=MODELS)
def source(request: pytest.FixtureRequest, vision_language: Callable[[str], Path]) -> Path:
    return vision_language(request.param)


def dequantized(artifact: Path, folder: Path) -> Path:
    """The artifact's weights as an unquantized checkpoint, for transformers alone."""
    checkpoint = Checkpoint(artifact)
    contents = read_quantized(checkpoint)
    tensors = {name: checkpoint.read(name) for name in contents.plain}
    for layer in contents.quantized:
        qtensor = read_layer(checkpoint, contents.format, contents.schemes[layer], layer)
        tensors[f"{layer}.weight"] = qtensor.dequantize()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = read_json(artifact / "config.json")
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_artifact_is_the_whole_model_with_its_decoder_quantized(source: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    quantize(source, {"scheme": "int4-g32", "format": "compressed-tensors"}, artifact)
    model = load_model(Checkpoint(artifact), torch.device("cpu"), "auto", "reference")
    config = read_json(source / "config.json")
    assert [type(model).__name__] == config["architectures"]
    dense = AutoModelForImageTextToText.from_pretrained(dequantized(artifact, tmp_path / "dense")).eval()
    assert torch.equal(logits(model), logits(dense))
    original = AutoModelForImageTextToText.from_pretrained(source)
    blocks = decoder(original)
    kept = [name for name, _ in original.named_parameters() if not name.startswith(f"{blocks}.")]
    assert all(torch.equal(model.get_parameter(name), original.get_parameter(name)) for name in kept)
    assert any(".layers." in name or ".blocks." in name for name in kept), "the tower has blocks of its own"
    # every linear layer is quantized or in the ignore list, by the names of the files and by transformers' own
    quantized = read_quantized(Checkpoint(artifact)).quantized
    ignored = read_json(artifact / "config.json")["quantization_config"]["ignore"]
    assert not {*ignored} & quantized.keys()
    paths = {target.parameter.removesuffix(".weight") for target in quantized.values()}
    linear = {name for name, module in original.named_modules() if isinstance(module, nn.Linear)}
    assert linear - paths <= {*ignored}
    assert all(path.startswith(f"{blocks}.") for path in paths)
    files = {
        name.removesuffix(".weight")
        for name, info in Checkpoint(artifact).tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2 and "embed" not in name and "norm" not in name
    }
    assert files - {*ignored} <= quantized.keys()


@pytest.mark.parametrize("name", ["qwen2_vl", "mllama"])
def test_calibrated_on_text_alone(
    name: str, vision_language: Callable[[str], Path], tmp_path: Path, learn: Callable[..., list[str]], proved: Any
) -> None:
    notes = learn(vision_language(name), tmp_path / "out")
    assert proved(tmp_path / "out")["max_difference"] < 1e-6
    layers = read_json(tmp_path / "out" / "bitpress.json")["coverage"]["layers"]
    unread = [layer["name"] for layer in layers if layer["tokens"] == 0]
    assert all(".layers.1." in layer for layer in unread)
    assert len(unread) == (7 if name == "mllama" else 0), "its cross-attention reads images"
    assert ("text alone does not go through its block" in "\n".join(notes)) == bool(unread)


@pytest.mark.usefixtures("registered")
def test_transformers_loads_it_on_our_kernels_and_it_writes(
    vision_language: Callable[[str], Path], tmp_path: Path
) -> None:
    quantize(vision_language("qwen2_vl"), "int8-dynamic", tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    own = load_model(Checkpoint(tmp_path / "out"), torch.device("cpu"), "auto")
    assert torch.equal(logits(model), logits(own))
    prompt = ids()[:, :8]
    text = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    assert text.shape == (1, 12)
    diagnosis = diagnose(tmp_path / "out")
    assert diagnosis.runtimes["transformers"]["class"] == "AutoModelForImageTextToText"
    assert "transformers loads it by AutoModelForImageTextToText" in "\n".join(diagnosis.notes)
    snippets = [each.code for each in usage_snippets("owner/name", diagnosis.runtimes, False)]
    assert not any("AutoModelForCausalLM" in code for code in snippets)
    assert any("AutoModelForImageTextToText.from_pretrained" in code for code in snippets)


def test_a_converted_artifact_still_names_the_tower(vision_language: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = {"scheme": "int4-g32", "layers": {"*.down_proj": "int8-g32"}}
    quantize(vision_language("llava"), recipe | {"format": "gptq"}, tmp_path / "gptq")
    convert(tmp_path / "gptq", "compressed-tensors", tmp_path / "converted")
    quantize(vision_language("llava"), recipe | {"format": "compressed-tensors"}, tmp_path / "direct")
    converted, direct = (read_json(tmp_path / name / "config.json") for name in ("converted", "direct"))
    section = direct["quantization_config"]
    assert converted["quantization_config"]["ignore"] == section["ignore"]
    assert converted["quantization_config"]["config_groups"] == section["config_groups"]
    targets = [target for group in section["config_groups"].values() for target in group["targets"]]
    assert any(target.startswith(r"re:^model\.language_model\.layers\.") for target in targets), "transformers' names"
    assert any(target.startswith(r"re:^language_model\.model\.layers\.") for target in targets), "the files' names"


def test_no_tower_is_read_to_calibrate(source: Path) -> None:
    model = skeleton(Checkpoint(source))
    blocks = decoder(model)
    assert towers(model)
    assert not any(blocks.startswith(tower) or tower.startswith(blocks) for tower in towers(model))


@pytest.mark.parametrize(
    ("architectures", "name"),
    [
        (["Qwen3_5ForConditionalGeneration"], "AutoModelForImageTextToText"),
        (["Qwen3_5ForCausalLM"], "AutoModelForCausalLM"),
        (None, "AutoModelForImageTextToText"),
        (["NoSuchModel"], "AutoModelForImageTextToText"),
    ],
)
def test_the_class_is_what_the_config_names(architectures: list[str] | None, name: str) -> None:
    """Qwen3.5 has one config for the whole model and for its text decoder alone."""
    config = AutoConfig.for_model("qwen3_5")
    config.architectures = architectures
    assert auto_class(config).__name__ == name


def test_a_model_of_text_is_built_as_before() -> None:
    assert auto_class(AutoConfig.for_model("llama")).__name__ == "AutoModelForCausalLM"
    with pytest.raises(ValueError, match="transformers has no model for it that writes text"):
        auto_class(AutoConfig.for_model("resnet"))
