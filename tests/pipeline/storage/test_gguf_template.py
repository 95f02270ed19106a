"""GGUF by a template, against the tables of architectures, and of an architecture that has none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoints import save_tokenizer_of_llamacpp as save_tokenizer
from safetensors.torch import load_file

from bitpress.pipeline.api import convert, quantize
from bitpress.pipeline.errors import ConfigError
from bitpress.pipeline.formats import registry
from bitpress.pipeline.models.loading import load_model
from bitpress.pipeline.storage.checkpoint import Checkpoint
from bitpress.pipeline.storage.gguf.file import read_gguf
from bitpress.pipeline.storage.gguf.template import PLACES, Places

FILE = "model.gguf"
CHANGES: dict[str, dict[str, Any]] = {"gemma2": {"query_pre_attn_scalar": 16}}
IDS = torch.tensor([[5, 17, 60, 33, 2, 80, 9, 41]])


def unquantized(folder: Path, out: Path) -> Path:
    """A model as a GGUF file, by the tables, without a word of where its tensors lie."""
    checkpoint, format = Checkpoint(folder), registry()["gguf"]
    out.mkdir()
    writer = format.writer(out, torch.float32, 1)
    for name in checkpoint.tensors:
        writer.add(name, checkpoint.read(name))
    writer.adopt(writer.cut(0).write())
    writer.close(checkpoint.config, {}, checkpoint.other_files())
    return out / FILE


def of_gpt2(folder: Path, path: Path, change: Callable[[dict[str, Any]], None] = lambda tensors: None) -> Path:
    """A GPT-2 as a GGUF file, as llama.cpp's converter (conversion/gpt2.py) makes it."""
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    ids = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([ids.get(number, f"[PAD{number}]") for number in range(config["vocab_size"])])
    writer.add_token_types([1 if number in ids else 5 for number in range(config["vocab_size"])])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config["n_layer"])
    written = {}
    for name, tensor in tensors.items():
        turned = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        own = names.get_name(name, (".weight", ".bias"))
        written[own] = (tensor.t() if turned else tensor).float().contiguous().numpy()
    change(written)
    for own, value in written.items():
        writer.add_tensor(own, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def source(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """source(architecture): a tiny model with a tokenizer that llama.cpp knows."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name) / name
        shutil.copytree(tiny(name, vocab_size=300, **CHANGES.get(name, {})), folder)
        save_tokenizer(folder)
        return folder

    return make


def logits_of(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(Checkpoint(folder), torch.device("cpu"), "float32", "reference")(IDS).logits


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2_moe", "mixtral"])
def test_it_leads_to_what_the_tables_say(name: str, source: Callable[..., Path], tmp_path: Path) -> None:
    """Heads that are permuted, norms plus 1, a gate without its first dimension, experts in one tensor."""
    folder = source(name)
    base = unquantized(folder, tmp_path / "base")
    recipe = {"scheme": "int4-g32", "format": "gguf"}
    quantize(folder, recipe, tmp_path / "table")
    quantize(folder, recipe | {"template": str(base)}, tmp_path / "template")
    one, other = (gguf.GGUFReader(tmp_path / made / FILE) for made in ("table", "template"))
    assert {t.name for t in one.tensors} == {t.name for t in other.tensors}
    theirs = {tensor.name: tensor for tensor in other.tensors}
    for tensor in one.tensors:
        assert tensor.tensor_type == theirs[tensor.name].tensor_type, tensor.name
        assert np.array_equal(tensor.data, theirs[tensor.name].data), tensor.name
    own = {"general.name", PLACES}
    values = [{k: f.contents() for k, f in r.fields.items() if k not in own and k[:5] != "GGUF."} for r in (one, other)]
    assert values[0] == values[1]
    assert torch.equal(logits_of(tmp_path / "table"), logits_of(tmp_path / "template"))


def test_an_architecture_without_a_table(source: Callable[..., Path], tmp_path: Path) -> None:
    folder, artifact = source("gpt2"), tmp_path / "artifact"
    base = of_gpt2(folder, tmp_path / "base.gguf")
    with pytest.raises(ConfigError, match=r"'gpt2' is not known here as GGUF.* --template takes what it lacks"):
        quantize(folder, {"scheme": "int8-g32", "format": "gguf"}, artifact)
    quantize(folder, {"scheme": "int8-g32", "format": "gguf", "template": str(base)}, artifact)
    file = read_gguf(artifact / FILE)
    assert file.metadata["gpt2.attention.head_count"] == 4
    assert {file.tensors[f"blk.1.{own}.weight"].kind.name for own in ("attn_qkv", "ffn_up", "ffn_down")} == {"Q8_0"}
    quantize(folder, {"scheme": "int8-g32", "format": "gptq"}, tmp_path / "gptq")
    assert torch.equal(logits_of(artifact), logits_of(tmp_path / "gptq"))
    convert(tmp_path / "gptq", "gguf", tmp_path / "converted", template=base)
    assert torch.equal(logits_of(tmp_path / "converted"), logits_of(artifact))
    convert(artifact, "gptq", tmp_path / "back")
    assert torch.equal(logits_of(tmp_path / "back"), logits_of(artifact))


def scaled(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({name: tensors[name][::-1].copy()})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: tensors.pop("blk.1.ffn_up.bias"), "no tensor for .*c_fc.bias, which would be blk"),
        (scaled("blk.0.attn_output.weight"), "values of .*h.0.attn.c_proj.weight are not those of blk.0.attn_output"),
        (scaled("output_norm.bias"), "values of .*ln_f.bias are not those of output_norm.bias"),
        (lambda tensors: tensors.update({"blk.1.ffn_up.bias": tensors["blk.0.attn_qkv.bias"]}), r"there \[192\]"),
        (lambda tensors: tensors.update({"blk.0.attn_q.weight": tensors["output_norm.bias"]}), "no tensor for blk.0"),
    ],
)  # fmt: skip
def test_a_file_of_another_model_is_refused(
    change: Callable[[dict[str, Any]], None], reason: str, source: Callable[..., Path], tmp_path: Path
) -> None:
    folder = source("gpt2")
    base = of_gpt2(folder, tmp_path / "base.gguf", change)
    with pytest.raises(ConfigError, match=reason):
        quantize(folder, {"scheme": "int8-g32", "format": "gguf", "template": str(base)}, tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


def test_another_tokenizer_and_other_formats_are_refused(source: Callable[..., Path], tmp_path: Path) -> None:
    folder = source("gpt2")
    base = of_gpt2(folder, tmp_path / "base.gguf")
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(
        text.replace('"Ġwo": 261', '"Ġwa": 261').replace('["Ġw", "o"]', '["Ġw", "a"]')
    )
    recipe = {"scheme": "int8-g32", "template": str(base)}
    for changes, reason in (
        ({"format": "gguf"}, "tokens of the tokenizer are others there"),
        ({"format": "gptq"}, "template is for GGUF files .*; gptq takes none"),
        ({}, "format is auto: name it"),
    ):
        with pytest.raises(ConfigError, match=reason):
            quantize(folder, recipe | changes, tmp_path / "artifact")


@pytest.mark.parametrize(
    "text",
    [
        "[]", "{", '{"a": 1}', '{"a": {"name": "other"}}', '{"a": {"name": "x", "heads": -1}}', '{"a": {}}',
        '{"a": {"name": "e", "expert": 0}}', '{"a": {"name": "x"}, "b": {"name": "x"}}',
        '{"a": {"name": "x", "odd": 1}}', '{"a": {"name": "e", "expert": 0}, "b": {"name": "e", "expert": 2}}',
        '{"a": {"name": "x", "expert": true}}', '{"a": {"name": "x", "shift": 1e9}}', '{"a": {"name": ["x"]}}',
    ],
)  # fmt: skip
def test_places_that_nobody_wrote(text: str) -> None:
    with pytest.raises(ValueError, match=r"bitpress\.places|Expecting"):
        Places.of_json("gpt2", text, {"x": 4, "e": 2})
