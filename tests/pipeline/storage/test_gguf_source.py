"""GGUF files of other programs as checkpoints: names, config and tokenizer from the metadata, weights dequantized."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from bitpress.pipeline.errors import CheckpointError, ConfigError
from bitpress.pipeline.hub.download import resolve
from bitpress.pipeline.storage.checkpoint import Checkpoint
from bitpress.pipeline.storage.gguf.architectures import complete, generated_tensors, model_metadata
from bitpress.pipeline.storage.gguf.file import GGUFFile, read_gguf
from bitpress.pipeline.storage.gguf.source import config_of
from bitpress.pipeline.storage.gguf.vocabulary import tokenizer_files

BASE = {
    "vocab_size": 20, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 5e5,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
TOKENS = ["<|end|>", "a", "b", "ab", *(f"t{number}" for number in range(16))]
TOKENIZER = {
    "model": "gpt2", "pre": "smollm", "tokens": TOKENS, "token_type": [3, *[1] * 19], "merges": ["a b"],
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bitpress" / "gguf"


def write(path: Path, metadata: dict[str, Any], tensors: dict[str, Any]) -> GGUFFile:
    """A file as gguf writes it. tensors: arrays, or (bytes of rows, type)."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif key != "general.architecture":
            kind = gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
            writer.add_key_value(key, value, kind)
    for name, value in tensors.items():
        data, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_gguf(path)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama"},
        {"model_type": "llama", "rope_parameters": LLAMA3, "max_position_embeddings": 131072},
        {"model_type": "llama", "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
        {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
        {"model_type": "qwen2", "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        {"model_type": "qwen3", "head_dim": 96},
        {"model_type": "qwen2_moe", **MOE, "shared_expert_intermediate_size": 128, "norm_topk_prob": False},
        {"model_type": "qwen3_moe", **MOE, "norm_topk_prob": True},
        {"model_type": "gemma2", "query_pre_attn_scalar": 64, "sliding_window": 128},
        {"model_type": "gemma3_text", "query_pre_attn_scalar": 64, "sliding_window": 128, "rope_theta": 1e6},
        {"model_type": "phi3", "sliding_window": 128},
    ],
    ids=lambda config: f"{config['model_type']}-{len(config)}",
)
def test_the_config_means_the_same_model(config: dict[str, Any], tmp_path: Path) -> None:
    config = {**BASE, **config}
    tensors = {"token_embd.weight": np.zeros((20, 256), np.float16)}
    tensors |= {name: tensor.numpy() for name, tensor in generated_tensors(config).items()}
    file = write(tmp_path / "x.gguf", model_metadata(config), tensors)
    again = config_of(file)
    assert again["model_type"] == config["model_type"]
    assert again["tie_word_embeddings"] is True
    assert again["dtype"] == "float16"
    before, after = complete(config), complete(again)
    for key in ("hidden_size", "head_dim", "hidden_act", "num_key_value_heads", "query_pre_attn_scalar", "num_experts"):
        assert after.get(key) == before.get(key), key
    assert after["rope"]["full_attention"].get("factor") == before["rope"]["full_attention"].get("factor")
    assert model_metadata(again) == pytest.approx(model_metadata(config))


def tokenizer_of(**changes: Any) -> dict[str, Any]:
    values = {key: value for key, value in {**TOKENIZER, **changes}.items() if value is not None}
    files = tokenizer_files({f"tokenizer.ggml.{key}": value for key, value in values.items()})
    assert isinstance(files["tokenizer.json"], dict)
    return files["tokenizer.json"]


def test_a_tokenizer_of_bytes() -> None:
    made = tokenizer_of(add_bos_token=True)
    assert [step["type"] for step in made["pre_tokenizer"]["pretokenizers"]] == ["Digits", "ByteLevel"]
    assert made["model"]["merges"] == [["a", "b"]]
    assert [entry["content"] for entry in made["added_tokens"]] == ["<|end|>"]
    ids = Tokenizer.from_str(json.dumps(made)).encode("ab<|end|>a").ids
    assert ids == [0, 3, 0, 1]


def test_a_tokenizer_in_the_manner_of_sentencepiece() -> None:
    tokens = ["<unk>", "<s>", "<0x41>", "\u2581", "a", "b", "\u2581a", "ab", "\u2581ab"]
    made = tokenizer_of(
        model="llama", pre=None, merges=None, tokens=tokens, token_type=[2, 3, 6, 1, 1, 1, 1, 1, 1],
        scores=[0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0], unknown_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    assert made["model"]["merges"] == [["a", "b"], ["\u2581", "a"], ["\u2581", "ab"], ["\u2581a", "b"]]
    tokenizer = Tokenizer.from_str(json.dumps(made))
    assert tokenizer.encode("ab A").tokens == ["<s>", "\u2581ab", "\u2581", "<0x41>"]
    assert tokenizer.decode([8, 3, 2]) == "ab A"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pre": "deepseek-v3"}, "splits text by 'deepseek-v3'"),
        ({"model": "bert"}, "of the kind 'bert'"),
        ({"merges": ["a z"]}, "the merge 'a z'"),
        ({"merges": ["a b c"]}, "the merge 'a b c'"),
        ({"tokens": [*TOKENS, "a"], "token_type": [1] * 21}, "are the same"),
        ({"token_type": [1]}, "the types of 1"),
        ({"tokens": ["a", 1]}, "no list of values of type str"),
        ({"bos_token_id": 99}, "there are 20 tokens"),
    ],
)
def test_tokenizers_that_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        tokenizer_of(**changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"general.architecture": "mamba"}, "'mamba' is not known here"),
        ({"llama.block_count": None}, "llama.block_count is None"),
        ({"llama.block_count": 1 << 31}, "llama.block_count is 2147483648"),
        ({"llama.attention.head_count": 0}, "no config: ZeroDivisionError"),
        ({"llama.rope.scaling.type": "magic"}, "scaled by 'magic'"),
        ({"llama.attention.value_length": 32}, "value_length is 32, and the config that is made of it means 64"),
        ({"split.count": 3}, "one of several parts"),
    ],
)
def test_models_that_are_refused(changes: dict[str, Any], reason: str, tmp_path: Path, cache: Path) -> None:
    metadata = {**model_metadata({**BASE, "model_type": "llama"}), **changes}
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in TOKENIZER.items()}
    if "head_count" in str(changes):
        metadata |= {"llama.attention.head_count_kv": 0, "llama.attention.key_length": None}
        metadata["llama.rope.dimension_count"] = None
    metadata = {key: value for key, value in metadata.items() if value is not None}
    write(tmp_path / "x.gguf", metadata, {"token_embd.weight": np.zeros((20, 256), np.float32)})
    with pytest.raises(CheckpointError, match=reason):
        resolve(str(tmp_path / "x.gguf"))
    assert not cache.exists() or not list(cache.iterdir())


def test_blocks_of_other_types_are_dequantized(tmp_path: Path) -> None:
    """Q6_K and Q4_K, which bitpress never writes; q's rows in the order of transformers; found again, once unpacked."""
    generator = np.random.default_rng(0)

    def blocks(kind: gguf.GGMLQuantizationType) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
        size = gguf.GGML_QUANT_SIZES[kind][1]
        data = generator.integers(0, 256, (256, size), dtype=np.uint8)
        data[:, [1, 3, size - 1]] &= 0x3B  # the high bytes of float16 scales: finite ones
        return data, kind

    tensors = {
        "token_embd.weight": np.zeros((20, 256), np.float32),
        "blk.0.attn_q.weight": blocks(gguf.GGMLQuantizationType.Q4_K),
        "blk.0.attn_output.weight": blocks(gguf.GGMLQuantizationType.Q6_K),
    }
    metadata = model_metadata({**BASE, "model_type": "llama"})
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in TOKENIZER.items()}
    write(tmp_path / "x.gguf", metadata, tensors)
    folder = resolve(str(tmp_path)).folder
    assert folder == resolve(str(tmp_path / "x.gguf")).folder
    checkpoint = Checkpoint(folder)
    assert "2 weights lie in x.gguf as Q4_K, Q6_K" in str(checkpoint.dequantization)
    for name, own in (("q", "attn_q"), ("o", "attn_output")):
        data, kind = tensors[f"blk.0.{own}.weight"]
        expected = torch.from_numpy(gguf.quants.dequantize(data, kind))
        if name == "q":
            expected = expected.reshape(4, 32, 2, 256).transpose(1, 2).reshape(256, 256)
        read = checkpoint.read(f"model.layers.0.self_attn.{name}_proj.weight")
        assert torch.equal(read, expected)
        (part,) = checkpoint.read_rows(f"model.layers.0.self_attn.{name}_proj.weight", [7], first=3)
        assert torch.equal(part, expected[3:10])
    (tmp_path / "y.gguf").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"holds 2 GGUF files, x.gguf, y.gguf; name one of them"):
        resolve(str(tmp_path))
