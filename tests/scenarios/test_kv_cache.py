"""A recipe that rounds the key-value cache: from calibration to files, and from files to whoever reads them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicLayer

import bitpress.pipeline.hf  # noqa: F401  # from_pretrained knows bitpress's files
from bitpress.pipeline.api import convert, load, quantize
from bitpress.pipeline.checkpoints.describe import describe
from bitpress.pipeline.checkpoints.doctor import diagnose
from bitpress.pipeline.config.schema import Calibrate, Eval
from bitpress.pipeline.errors import CheckpointError, ConfigError
from bitpress.pipeline.evaluate.measure import measure_task
from bitpress.pipeline.models.loading import calibrate_on
from bitpress.pipeline.quantize import block_runner
from bitpress.pipeline.quantize.recipe import Recipe
from bitpress.pipeline.storage.checkpoint import Checkpoint, read_json

IDS = torch.arange(3, 35).view(1, -1)
LAYER = "model.layers.1.self_attn"
RECIPES: dict[str, dict[str, Any]] = {
    "fp8": {"scheme": "none", "kv_cache": "fp8"},
    "int8": {"scheme": "int4-g32", "kv_cache": "int8"},
    "int4": {"scheme": "int4-g32", "kv_cache": "int4-g16"},
}


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    text = tmp_path_factory.mktemp("text") / "calibration.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 40)
    return {"text": str(text), "windows": 6, "context": 32}


@pytest.fixture(scope="module")
def made(
    tiny_llama: Path, calibration: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """made(name): the artifact of a recipe, read only."""
    folder = tmp_path_factory.mktemp("made")

    def make(name: str) -> Path:
        if not (folder / name).exists():
            own = {} if name == "int4" else {"calibration": calibration}
            quantize(tiny_llama, {**RECIPES[name], **own}, folder / name, device="cpu")
        return folder / name

    return make


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS, use_cache=True).logits[0]


def test_scales_are_the_largest_magnitudes_on_the_text(
    made: Callable[[str], Path], tiny_llama: Path, calibration: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen by transformers' own cache, of the unquantized model, in one forward of all windows."""
    seen: list[float] = []
    stored, update = tensors_of(made("fp8")), DynamicLayer.update

    def watch(layer: DynamicLayer, keys: Tensor, values: Tensor, *more: Any) -> Any:
        seen.extend([keys.abs().max().item(), values.abs().max().item()])
        return update(layer, keys, values, *more)

    monkeypatch.setattr(DynamicLayer, "update", watch)
    ids = calibrate_on(Checkpoint(tiny_llama), Calibrate.model_validate(calibration)).ids
    with torch.inference_mode():
        AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)(input_ids=ids, use_cache=True)
    first = [stored[f"model.layers.0.self_attn.{name}"] for name in ("k_scale", "v_scale")]
    assert [scale.shape for scale in first] == [(1,), (1,)]
    assert [scale.item() for scale in first] == pytest.approx([peak / 448 for peak in seen[:2]], rel=1e-6)
    later = [stored[f"{LAYER}.{name}"].item() for name in ("k_scale", "v_scale")]
    assert later == pytest.approx([peak / 448 for peak in seen[2:]], rel=0.1)  # it reads what the rounded block put out
    heads = tensors_of(made("int8"))[f"{LAYER}.k_scale"]
    assert heads.shape == (2, 1, 1)
    assert heads[0] != heads[1]


def test_the_config_says_it_as_vllm_reads_it(made: Callable[[str], Path]) -> None:
    section = read_json(made("fp8") / "config.json")["quantization_config"]
    assert section["kv_cache_scheme"].items() >= {
        "num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False
    }.items()  # fmt: skip
    assert (section["quant_method"], section["format"], section["config_groups"]) == ("compressed-tensors", "dense", {})
    assert (
        describe(made("fp8")).items() >= {"quantized": "none", "key-value cache": "fp8", "quantized layers": 0}.items()
    )


@pytest.mark.parametrize("name", RECIPES)
def test_whoever_loads_it_rounds(name: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    own, plain = load(made(name), device="cpu", kernel="reference")[0], tmp_path / "plain"
    expected = logits(own)
    theirs = AutoModelForCausalLM.from_pretrained(made(name))
    assert torch.allclose(logits(theirs), expected, atol=0.1)
    theirs.save_pretrained(plain)
    stored, saved = tensors_of(made(name)), tensors_of(plain)
    assert all(torch.equal(saved[tensor], stored[tensor]) for tensor in stored)
    assert read_json(plain / "config.json")["quantization_config"]["kv_cache_scheme"]
    assert diagnose(made(name)).sound


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_the_scales_do_not_depend_on_batches(
    name: str, made: Callable[[str], Path], tiny_llama: Path, calibration: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(block_runner.BATCH_TOKENS, "cpu", 64)
    quantize(tiny_llama, {**RECIPES[name], "calibration": calibration}, tmp_path / "out", device="cpu")
    one, other = tensors_of(made(name)), tensors_of(tmp_path / "out")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[tensor], other[tensor]) for tensor in one)


def test_the_doctor_says_who_loads_it(made: Callable[[str], Path], tmp_path: Path) -> None:
    diagnoses = {name: diagnose(made(name)) for name in RECIPES}
    loads = {name: diagnosis.runtimes["vLLM"]["loads"] for name, diagnosis in diagnoses.items()}
    assert loads == {"fp8": "yes", "int8": "no", "int4": "no"}
    loads = {name: diagnosis.runtimes["transformers"]["loads"] for name, diagnosis in diagnoses.items()}
    assert loads == {"fp8": "yes", "int8": "yes", "int4": "unknown"}
    assert "key-value cache: keys and values are rounded to int8 (calibrated, a scale for each head)" in (
        diagnoses["int8"].notes
    )
    with pytest.raises(ConfigError, match=r"cannot become gptq: .* quantize the key-value cache"):
        convert(made("int4"), "gptq", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert(made("int8"), "compressed-tensors", tmp_path / "same")
    assert diagnose(tmp_path / "same").runtimes["vLLM"] == diagnoses["int8"].runtimes["vLLM"]


def test_it_is_measured_with_the_cache(
    made: Callable[[str], Path], tiny_llama: Path, calibration: dict[str, Any], tmp_path: Path
) -> None:
    chosen = {"text": calibration["text"], "context": 32, "windows": 2, "speed": None}
    request = {
        "artifact": str(made("fp8")), "baseline": str(tiny_llama), "eval": Eval.model_validate(chosen).model_dump(),
        "device": "cpu", "folder": str(tmp_path),
    }  # fmt: skip
    answer = measure_task(request)
    assert answer["quality"]["kl_mean"] > 1e-6
    memory = answer["memory"]
    assert memory["kv_cache_bytes_per_token"] == 128  # 2 layers, 2 heads, 16 features
    assert memory["kv_cache"] == {"type": "fp8", "kv_cache_bytes_per_token": 256}


def change(name: str, value: Tensor | None) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(name) if value is None else tensors.update({name: value})


FAULTS: dict[str, tuple[str, Tensor | None, str]] = {
    "NaN": ("fp8", torch.tensor([torch.nan]), "k_scale holds nan, expected positive numbers"),
    "zero": ("fp8", torch.zeros(1), r"k_scale holds 0\.0, expected positive numbers"),
    "infinite": ("int8", torch.full((2, 1, 1), torch.inf), "k_scale holds inf, expected positive numbers"),
    "shape": ("fp8", torch.ones(4), r"k_scale has shape \[4\], expected \[1\]"),
    "heads": ("int8", torch.ones(3, 1, 1), r"k_scale has shape \[3, 1, 1\], expected \[2, 1, 1\]"),
    "dtype": ("fp8", torch.ones(1, dtype=torch.int32), r"k_scale has dtype torch\.int32, expected torch\.float32"),
    "missing": ("int8", None, "quantizes the key-value cache to int8, and scales are missing:\n.*k_scale"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_tampered_scales(
    fault: str, made: Callable[[str], Path], copy_of: Callable[..., Path], edit_tensors: Callable[..., None]
) -> None:
    name, value, said = FAULTS[fault]
    folder = copy_of(made(name))
    file = next(path for path in folder.glob("*.safetensors") if f"{LAYER}.k_scale" in load_file(path))
    edit_tensors(file, change(f"{LAYER}.k_scale", value))
    index = read_json(folder / "model.safetensors.index.json")
    if value is None:
        del index["weight_map"][f"{LAYER}.k_scale"]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=said):
        load(folder, device="cpu")
    (folder / "bitpress.json").unlink()  # which has the files' hashes
    faults = " ".join(diagnose(folder).faults)
    assert said.partition(" has ")[0].partition(" holds ")[0].partition(":")[0] in faults


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"kv_cache": "fp7"}, "kv_cache: 'fp7' is no type of cache; use fp8"),
        ({"kv_cache": "fp8", "format": "gptq"}, r"format: gptq has no place for a quantized key-value cache \(fp8\)"),
        ({"kv_cache": "fp8", "distill": 3}, "kv_cache: distill trains the model with a cache that is not rounded"),
        ({"kv_cache": "int8-g64", "calibration": "text"}, "calibration: no method of the recipe is calibrated"),
        ({"kv_cache": "int4-g64"}, "kv_cache int4-g64 does not fit .*heads of 16 features are no whole groups of 64"),
    ],
)  # fmt: skip
def test_refusals(keys: dict[str, Any], said: str, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        quantize(tiny_llama, {"scheme": "int4-g32", **keys}, tmp_path / "out", device="cpu")


def test_names() -> None:
    recipe = Recipe.make({"scheme": "none", "kv_cache": "fp8"})
    assert (recipe.name, recipe.scheme, recipe.calibrated) == ("none-kv-fp8", "none", True)
    assert Recipe.make({"scheme": "int4-g32", "kv_cache": "int8-g64"}).name == "int4-g32-kv-int8-g64"
    assert Recipe.make("int4-g32").to_dict().keys().isdisjoint({"kv_cache", "kv_cache.version"})
