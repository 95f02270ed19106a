"""A GGUF file of another program as a checkpoint: config.json and a tokenizer from its metadata, weights dequantized.

Its metadata say what llama.cpp computes. The config that is made of them must say the very same when it is written as
metadata again, or the file is refused.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError
from ..files import cache_folder, copy_file, disk_errors, make_folder, publish_folder, remove_folder, write_json
from .architectures import ARCHITECTURES, generated_tensors, model_metadata
from .file import GGUFFile, read_gguf
from .vocabulary import special_ids, tokenizer_files

_CLASSES = {
    "llama": "LlamaForCausalLM", "mixtral": "MixtralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM", "phi3": "Phi3ForCausalLM",
}  # fmt: skip
_LARGEST = 1 << 31  # of a number in the metadata
_LLAMA3_FACTORS = (8.0, 32.0, 16.0)  # of the models that have rope_freqs.weight; their other settings are the same
_SUFFIX = ".gguf"


def container(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only one of a folder without config.json; None for others.

    Raises:
        ConfigError: there are several.
    """
    if os.path.isfile(path) and path.suffix == _SUFFIX:  # unlike Path.is_file, False for a name that no file can have
        return path
    if not os.path.isdir(path) or (path / "config.json").exists():
        return None
    containers = sorted(path.glob(f"*{_SUFFIX}"))
    if len(containers) > 1:
        names = ", ".join(each.name for each in containers[:3])
        raise ConfigError(f"{path} holds {len(containers)} GGUF files, {names}; name one of them")
    return containers[0] if containers else None


def unpacked(path: Path) -> Path:
    """A folder in the user's cache that holds a GGUF file as a checkpoint: a link to it, config.json and a tokenizer.

    It is made once; a file that changes gets another one.

    Raises:
        CheckpointError: the file is damaged, or holds no model that bitpress knows as GGUF. DiskError: no room, or
            no cache of the user's.
    """
    stat = path.stat()
    key = hashlib.sha256(json.dumps([str(path.resolve()), stat.st_size, stat.st_mtime_ns]).encode()).hexdigest()[:12]
    base = cache_folder("gguf")
    folder = base / f"{path.stem}-{key}"
    if folder.exists():
        return folder
    file = read_gguf(path)
    try:
        config, texts = config_of(file), tokenizer_files(file.metadata)
    except (ValueError, KeyError, TypeError, ZeroDivisionError, OverflowError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"its metadata make no config: {error!r}"
        raise CheckpointError(f"{path} cannot be read as a model: {reason}") from error
    work = base / f".{folder.name}.{os.getpid()}"
    make_folder(work)
    try:
        write_json(work / "config.json", config)
        for name, content in texts.items():
            if isinstance(content, str):
                with disk_errors(work / name):
                    (work / name).write_text(content, encoding="utf-8")
            else:
                write_json(work / name, content)
        try:
            os.link(path.resolve(), work / path.name)
        except OSError:  # on another disk
            copy_file(path, work / path.name)
        if not folder.exists():
            publish_folder(work, folder)
    finally:
        if work.exists():
            remove_folder(work)
    return folder


def config_of(file: GGUFFile) -> dict[str, Any]:
    """The config.json of the model in a GGUF file.

    Raises:
        ValueError: metadata that are missing, of another type or range, or that mean something not known here.
    """
    read = _Metadata(file.metadata)
    if read.number("split.count", 1) != 1:
        raise ValueError("it is one of several parts; join them by llama-gguf-split --merge")
    own = file.metadata.get("general.architecture")
    known = {architecture.name for architecture in ARCHITECTURES.values()}
    if own not in known:
        raise ValueError(f"its architecture {own!r} is not known here as GGUF, only {', '.join(sorted(known))}")
    experts = read.number(f"{own}.expert_count", 0)
    kind = next(
        kind
        for kind, architecture in ARCHITECTURES.items()
        if architecture.name == own and bool(experts) == any("{e}" in layer for layer in architecture.layers)
    )
    heads, hidden = read.number(f"{own}.attention.head_count"), read.number(f"{own}.embedding_length")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError("it has no token_embd.weight")
    default_dim = read.number(f"{own}.rope.dimension_count", 0) if own != "phi3" else 0
    config: dict[str, Any] = {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": read.number(f"{own}.feed_forward_length"),
        "num_hidden_layers": read.number(f"{own}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": read.number(f"{own}.attention.head_count_kv", heads),
        "head_dim": read.number(f"{own}.attention.key_length", default_dim or hidden // heads),
        "max_position_embeddings": read.number(f"{own}.context_length"),
        "rms_norm_eps": read.real(f"{own}.attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": _dtype(file),
        **special_ids(file.metadata),
    }
    if kind == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if experts:
        config["num_local_experts" if kind == "mixtral" else "num_experts"] = experts
        config["num_experts_per_tok"] = read.number(f"{own}.expert_used_count")
        if kind != "mixtral":
            config["moe_intermediate_size"] = read.number(f"{own}.expert_feed_forward_length")
            config["norm_topk_prob"] = kind == "qwen3_moe"  # as llama.cpp has it
            if shared := read.number(f"{own}.expert_shared_feed_forward_length", 0):
                config["shared_expert_intermediate_size"] = shared
    if own.startswith("gemma"):
        config["hidden_activation"] = "gelu_pytorch_tanh"
        large = config["num_hidden_layers"] in (46, 62)  # how llama.cpp knows the 27B models
        config["query_pre_attn_scalar"] = hidden // heads if large else config["head_dim"]
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            config[key] = read.real(f"{own}.{key}", 0.0) or None
    if own.startswith("gemma") or own == "phi3":
        config["sliding_window"] = read.number(f"{own}.attention.sliding_window", 0) or None
    config |= _rope(file, read, own, config)
    _check(file, config)
    return config


class _Metadata:
    """Numbers from a file's metadata, each checked."""

    def __init__(self, metadata: Mapping[str, Any]):
        self.metadata = metadata

    def number(self, key: str, default: int | None = None) -> int:
        """A whole number that is not negative. Raises ValueError where there is none and no default."""
        value = self.metadata.get(key, default)
        if type(value) is not int or not 0 <= value < _LARGEST:
            raise ValueError(f"{key} is {value!r:.40}, expected a whole number")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number. Raises ValueError where there is none and no default."""
        value = self.metadata.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"{key} is {value!r:.40}, expected a number")
        return float(value)


def _rope(file: GGUFFile, read: _Metadata, own: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the rotary embedding."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": read.real(f"{own}.rope.freq_base", 10000.0)}
    scaling = file.metadata.get(f"{own}.rope.scaling.type", "none")
    original = read.number(f"{own}.rope.scaling.original_context_length", config["max_position_embeddings"])
    result = {"original_max_position_embeddings": original} if own == "phi3" else {}
    if "rope_factors_long.weight" in file.tensors:
        rope |= {"rope_type": "longrope", "original_max_position_embeddings": original}
        for kind in ("long", "short"):
            rope[f"{kind}_factor"] = _values(file, f"rope_factors_{kind}.weight").tolist()
    elif scaling in ("linear", "yarn"):
        rope |= {"rope_type": scaling, "factor": read.real(f"{own}.rope.scaling.factor")}
        if scaling == "yarn":
            rope["original_max_position_embeddings"] = original
    elif scaling != "none":
        raise ValueError(f"its rotary embedding is scaled by {scaling!r:.40}, which is not known here")
    dimensions = read.number(f"{own}.rope.dimension_count", config["head_dim"])
    if dimensions != config["head_dim"]:
        rope["partial_rotary_factor"] = dimensions / config["head_dim"]
    if "rope_freqs.weight" in file.tensors:
        factors = _values(file, "rope_freqs.weight")
        for factor in _LLAMA3_FACTORS:
            settings = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
            scaled = {**rope, "rope_type": "llama3", "factor": factor, **settings}
            computed = generated_tensors({**config, "rope_parameters": scaled})["rope_freqs.weight"]
            if computed.shape == factors.shape and torch.allclose(computed, factors, rtol=1e-4):
                return {"rope_parameters": scaled}
        raise ValueError("its rope_freqs.weight are not those of a Llama 3 model")
    if own == "gemma3":
        return {
            "rope_theta": rope["rope_theta"],
            "rope_local_base_freq": read.real(f"{own}.rope.freq_base_swa", 1e4),
        } | ({"rope_scaling": rope} if rope["rope_type"] != "default" else {})
    return {"rope_parameters": rope, **result}


def _values(file: GGUFFile, name: str) -> Tensor:
    """A tensor of float32 numbers. Raises ValueError where it is of another type."""
    tensor = file.tensors[name]
    if tensor.kind.dtype != torch.float32 or tensor.nbytes > 1 << 20:
        raise ValueError(f"{name} is {tensor.kind.name}, expected F32")
    with file.path.open("rb") as handle:
        handle.seek(tensor.offset)
        return torch.frombuffer(bytearray(handle.read(tensor.nbytes)), dtype=torch.float32).reshape(-1)


def _dtype(file: GGUFFile) -> str:
    """The dtype of the file's plain matrices, and bfloat16 where all of them are quantized."""
    plain = [tensor.kind.dtype for tensor in file.tensors.values() if len(tensor.shape) > 1]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if dtype in plain:
            return str(dtype).removeprefix("torch.")
    return "bfloat16"


def _check(file: GGUFFile, config: Mapping[str, Any]) -> None:
    """Raises ValueError where a config means other metadata than the file has."""
    for key, value in model_metadata(config).items():
        stated = file.metadata.get(key)
        if key.endswith(("vocab_size", ".attention.sliding_window")) or stated is None:
            continue
        same = math.isclose(value, stated, rel_tol=1e-5) if isinstance(value, float) else value == stated
        if not same:
            raise ValueError(f"{key} is {stated!r:.40}, and the config that is made of it means {value!r}")
