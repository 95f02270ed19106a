"""A config.json that is unsupported, or made to do harm, is refused soon and in little memory."""

import gc
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpress.pipeline.api import quantize
from bitpress.pipeline.errors import CheckpointError
from bitpress.pipeline.storage.checkpoint import INDEX, SINGLE, Checkpoint, read_json

SCHEME = "int4-g32"


class TestUnsupported:
    @pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "compressed-tensors"])
    def test_quantized_already(
        self, source: Path, method: str, refused_early: Callable[..., str], edit_json: Callable[..., None]
    ):
        edit_json(source / "config.json", quantization_config={"quant_method": method})
        refused_early(source, f"is quantized already ({method}); give the original checkpoint")

    def test_our_own_artifact(self, source: Path, tmp_path: Path, refused_early: Callable[..., str]):
        quantize(source, SCHEME, tmp_path / "once")
        refused_early(tmp_path / "once", "is quantized already (gptq)")

    @pytest.mark.parametrize("section", ["gptq", 7, ["gptq"], {"bits": 4}])
    def test_odd_sections(
        self, source: Path, section: Any, refused_early: Callable[..., str], edit_json: Callable[..., None]
    ):
        edit_json(source / "config.json", quantization_config=section)
        refused_early(source, "is quantized already")

    def test_fp8_weights(self, source: Path, edit_tensors: Any, refused_early: Callable[..., str]):
        name = "model.layers.0.mlp.up_proj.weight"
        edit_tensors(source / SINGLE, lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)}))
        assert name in refused_early(source, "has no quantization_config, and tensors such as")

    @pytest.mark.parametrize(
        ("model_type", "said"),
        [
            *(
                (kind, "transformers builds no language model from it")
                for kind in ("nonesuch", None, 7, "bert_but_not", "vit")
            ),
            ("t5", "t5 is an encoder-decoder, or the half of one"),
        ],
    )
    def test_unknown_architecture(
        self,
        source: Path,
        model_type: Any,
        said: str,
        refused_early: Callable[..., str],
        edit_json: Callable[..., None],
    ):
        edit_json(source / "config.json", model_type=model_type)
        refused_early(source, said)


HOSTILE: dict[str, dict[str, Any]] = {
    "a terabyte of width": {"hidden_size": 1 << 40},
    "wide": {"hidden_size": 1 << 20},
    "vocabulary": {"vocab_size": 1 << 50},
    "inner": {"intermediate_size": 10**30},
    "layers": {"num_hidden_layers": 10**9},
    "some layers": {"num_hidden_layers": 3},
    "no layers": {"num_hidden_layers": 0},
    "negative layers": {"num_hidden_layers": -1},
    "negative width": {"hidden_size": -64},
    "no width": {"hidden_size": 0},
    "no heads": {"num_attention_heads": 0},
    "heads": {"num_attention_heads": 10**9},
    "key heads": {"num_key_value_heads": 10**9},
    "head width": {"head_dim": 1 << 36},
    "positions": {"max_position_embeddings": 1 << 27},
    "text for a number": {"hidden_size": "64"},
    "text for layers": {"num_hidden_layers": "many"},
    "list for a number": {"hidden_size": [64]},
    "null": {"hidden_size": None, "intermediate_size": None},
    "fraction": {"hidden_size": 64.5},
    "activation": {"hidden_act": "__import__('os').system"},
    "rope": {"rope_parameters": {"rope_type": "nonesuch"}},
    "experts": {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 10**9},
    "old model with square buffers": {"model_type": "gptj", "n_positions": 1 << 40, "n_layer": 1},
    "nested": {"text_config": {"num_hidden_layers": 10**9}, "model_type": "gemma3"},
}


def measured(job: Callable[[], Any], limit: int = 400 << 20) -> float:
    """Seconds that `job` takes with little address space beyond what is mapped now."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    was = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + limit, was[1]))
    gc.freeze()  # what other tests left behind is not looked through while a million lists are made
    start = time.process_time()
    try:
        job()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, was)
        gc.unfreeze()
    return time.process_time() - start


class TestHostileConfig:
    @pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE)
    def test_is_refused_soon_and_in_little_memory(
        self, source: Path, changes: dict[str, Any], refused_early: Callable[..., str], edit_json: Callable[..., None]
    ):
        edit_json(source / "config.json", **changes)
        assert measured(lambda: refused_early(source, "config.json")) < 2

    @pytest.mark.parametrize(
        "text",
        [
            '{"a":' * 900 + "1" + "}" * 900,
            '{"a":' * 200_000 + "1" + "}" * 200_000,
            "[" * 4_000_000,
            "[" + "[]," * 1_000_000 + "1]",
            '{"model_type": "llama", "model_type": "gpt2"}',
            '{"hidden_size": ' + "9" * 100_000 + "}",
            "null",
            "[]",
            '"llama"',
            "{",
            "{}",
            "",
        ],
        ids=["deep", "deeper", "deepest", "wide", "twice", "digits", "null", "list", "text", "cut", "nothing", "empty"],
    )
    def test_json(self, source: Path, text: str, refused_early: Callable[..., str]):
        (source / "config.json").write_text(text)
        assert measured(lambda: refused_early(source, "config.json")) < 2

    @pytest.mark.parametrize("name", ["config.json", INDEX])
    def test_huge_file_is_not_read(self, source: Path, name: str, refused_early: Callable[..., str]):
        with (source / name).open("ab") as file:
            file.truncate(2 << 30)
        assert measured(lambda: refused_early(source, "bytes, expected at most"), 100 << 20) < 1

    def test_sparse_weights_that_do_not_fit_into_memory(self, tmp_path: Path):
        path = tmp_path / "huge.safetensors"
        size = 1 << 36
        header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(path, 8 + len(header) + size)

        def job() -> None:
            with pytest.raises(CheckpointError, match="memory"):
                Checkpoint.single(path).read("w")

        assert measured(job) < 1  # there is no room for the package's map of the file
        assert measured(job, size + (1 << 30)) < 1  # there is, but not for a copy

    def test_duplicate_keys_of_a_large_file_are_found_soon(self, tmp_path: Path):
        path = tmp_path / "x.json"
        path.write_text("{" + ",".join(f'"{i}":0' for i in range(200_000)) + ',"199999":0}')
        start = time.process_time()
        with pytest.raises(CheckpointError, match="'199999' stands there twice"):
            read_json(path)
        assert time.process_time() - start < 1

    def test_every_tensor_of_another_shape_is_listed(
        self, source: Path, refused_early: Callable[..., str], edit_json: Callable[..., None]
    ):
        edit_json(source / "config.json", intermediate_size=96)
        message = refused_early(source, "does not match its config.json")
        assert message.count("by config.json") == 6
        assert "model.layers.1.mlp.down_proj.weight: shape [64, 128] in the file, [64, 96] by config.json" in message

    def test_layers_beyond_the_config_are_kept_and_listed(
        self, source: Path, tmp_path: Path, edit_json: Callable[..., None], kept: Callable[[Path], dict[str, str]]
    ):
        """As multi-token prediction layers are, which transformers leaves out."""
        edit_json(source / "config.json", num_hidden_layers=1)
        quantize(source, SCHEME, tmp_path / "out")
        assert sum(name.startswith("model.layers.1.") for name in kept(tmp_path / "out")) == 9

    def test_missing_tensors_are_listed(self, source: Path, edit_tensors: Any, refused_early: Callable[..., str]):
        names = ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
        edit_tensors(source / SINGLE, lambda tensors: [tensors.pop(name) for name in names])
        message = refused_early(source, "no tensor in the files")
        assert all(name in message for name in names)

    def test_the_plain_one_is_not_refused(self, source: Path, tmp_path: Path):
        def job() -> None:
            quantize(source, SCHEME, tmp_path / "out")

        measured(job)
