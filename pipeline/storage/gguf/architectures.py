"""What each architecture is called in a GGUF file: its tensors, and what its config says as keys of the metadata.

Source: conversion/ of llama.cpp (as in llama-cpp-python 0.3.36), and src/models/ of it for what its code takes for
granted.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Metadata = dict[str, Any]  # key -> text, number, truth value, or a list of one of these

_NUMBERS = re.compile(r"(?<=layers\.)(?P<block>\d+)(?=\.)|(?<=experts\.)(?P<expert>\d+)(?=\.)")
_BLOCK = re.compile(r"blk\.(\d+)\.")
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_ATTENTION = {f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"} | {"self_attn.o_proj": "attn_output"}
_FEED_FORWARD = {f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_GEMMA_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_FUSED = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_MIXTRAL = {
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.experts.{e}.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.{e}.w2": "ffn_down_exps",
    "block_sparse_moe.experts.{e}.w3": "ffn_up_exps",
}
_EXPERTS = {f"mlp.experts.{{e}}.{part}_proj": f"ffn_{part}_exps" for part in ("gate", "up", "down")}
_EXPERTS |= {"mlp.gate": "ffn_gate_inp"}
_SHARED = {f"mlp.shared_expert.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")}
_SHARED |= {"mlp.shared_expert_gate": "ffn_gate_inp_shexp"}
FACTOR = ".scale"  # of a weight's name in place of ".weight"
_GENERATED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # no weights of the model


@dataclass(frozen=True)
class Place:
    """Where a tensor of a checkpoint lies in a GGUF file.

    name: of the GGUF tensor. expert: its place there, where that holds all experts; else None.
    heads: rows lie in another order within each of so many heads (see permute); 0 where they lie as they are.
    shift: what the file has more of each value. flat: the file has it without its first dimension, which is 1.
    factor: what the products of a weight are multiplied by, the reciprocal of its global scale. wide: float32, where it
    is not quantized.
    """

    name: str
    expert: int | None = None
    heads: int = 0
    shift: float = 0.0
    flat: bool = False
    factor: bool = False
    wide: bool = False

    def of_factor(self) -> "Place":
        """The place of the factor of a weight that lies here."""
        return Place(f"{self.name.removesuffix('.weight')}{FACTOR}", self.expert, factor=True)


@dataclass(frozen=True)
class Architecture:
    """One architecture of transformers as llama.cpp knows it.

    name: llama.cpp's. layers: of a block, as transformers calls them -> as llama.cpp does; "{e}" is an expert's number.
    permuted: q's and k's rows lie in the order of another kind of rotary embedding. shifted: norms lie plus 1.
    defaults: what a config means that leaves a key out. factors: how the names of layers begin whose products llama.cpp
    multiplies by the factor of an NVFP4 weight (src/models/); elsewhere it reads the factor and leaves it out.
    problems: why a config means another model than llama.cpp's.
    """

    name: str
    layers: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    permuted: bool = False
    shifted: bool = False
    activations: tuple[str, ...] = ("silu", "swish")
    factors: tuple[str, ...] = ("attn_", "ffn_", "output")
    problems: Callable[[Mapping[str, Any]], Iterator[str]] = lambda config: iter(())

    def place(self, name: str, config: Mapping[str, Any]) -> Place | None:
        """Where a tensor of the checkpoint goes; None where llama.cpp has no place for it."""
        numbers = {key: value for match in _NUMBERS.finditer(name) for key, value in match.groupdict().items() if value}
        inside = re.fullmatch(r"model\.layers\.\d+\.(.+)\.(weight|bias)", name)
        if inside is None:
            return self._shifted(Place(_OUTSIDE[name]), name) if name in _OUTSIDE else None
        layer = re.sub(r"(?<=experts\.)\d+(?=\.)", "{e}", inside[1])
        if (own := self.layers.get(layer)) is None:
            return None
        expert = int(numbers["expert"]) if "{e}" in layer else None
        heads = self.heads(own, config) if self.permuted else 0
        flat = own == "ffn_gate_inp_shexp"
        return self._shifted(Place(f"blk.{numbers['block']}.{own}.{inside[2]}", expert, heads, flat=flat), name)

    def heads(self, own: str, config: Mapping[str, Any]) -> int:
        """The heads of a layer whose rows are permuted; 0 for any other."""
        count = config.get("num_attention_heads", 0)
        return {"attn_q": count, "attn_k": config.get("num_key_value_heads") or count}.get(own, 0)

    def _shifted(self, place: Place, name: str) -> Place:
        if self.shifted and name.endswith("norm.weight"):
            return Place(place.name, place.expert, place.heads, 1.0)
        return place

    def holds(self, gguf_name: str) -> bool:
        """Whether a tensor is one of the model, or may be, and not made of its config."""
        return not is_generated(gguf_name)

    def applies_factor(self, name: str, config: Mapping[str, Any], biased: bool) -> bool:
        """Whether llama.cpp multiplies by the factor of a layer's NVFP4 weight.

        Args:
            name: of the layer in the checkpoint. biased: whether it has a bias, before which feed-forward layers
                cannot have the factor.
        """
        place = self.place(f"{name}.weight", config)
        own = _BLOCK.sub("", place.name) if place else ""
        return own.startswith(self.factors) and not (biased and own.startswith("ffn_"))

    def names(self, gguf_name: str, experts: int) -> list[str] | None:
        """The checkpoint's names of what a GGUF tensor holds: one, or one of each expert; None: nothing of the model.

        Args:
            experts: how many a tensor of experts holds.
        """
        for name, own in _OUTSIDE.items():
            if own == gguf_name:
                return [name]
        block = _BLOCK.match(gguf_name)
        own, _, kind = gguf_name[block.end() :].rpartition(".") if block else ("", "", "")
        layer = next((layer for layer, name in self.layers.items() if name == own), None)
        if block is None or layer is None or kind not in ("weight", "bias"):
            return None
        name = f"model.layers.{int(block[1])}.{layer}.{kind}"
        return [name.replace("{e}", str(expert)) for expert in range(experts)] if "{e}" in layer else [name]


def is_generated(gguf_name: str) -> bool:
    """Whether a tensor is made of the config, and no weight."""
    return gguf_name in _GENERATED


def permute(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k [out, ..] in the order that llama.cpp's rotary embedding reads: the halves of a head interleaved.

    Source: LlamaModel.permute in conversion/llama.py.
    """
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def permute_back(rows: Tensor, heads: int) -> Tensor:
    """The inverse of permute."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _no_normalized_routing(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("norm_topk_prob"):
        yield "norm_topk_prob is true, and llama.cpp's qwen2moe takes it for false"
    yield from _only_experts(config)


def _normalized_routing(config: Mapping[str, Any]) -> Iterator[str]:
    if not config.get("norm_topk_prob"):
        yield "norm_topk_prob is false, and llama.cpp's qwen3moe takes it for true"
    yield from _only_experts(config)


def _only_experts(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        yield "some blocks have no experts, and llama.cpp expects them in all"


def _gemma_scale(config: Mapping[str, Any]) -> Iterator[str]:
    """llama.cpp knows the 27B models by their number of blocks, and takes head_dim for the scale of all others."""
    large = config.get("num_hidden_layers") in (46, 62)
    expected = config["hidden_size"] / config["num_attention_heads"] if large else config["head_dim"]
    if config.get("query_pre_attn_scalar", expected) != expected:
        yield f"query_pre_attn_scalar is {config['query_pre_attn_scalar']}, and llama.cpp takes {expected:g}"


_GEMMA = {"head_dim": 256, "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256, "hidden_act": "gelu_pytorch_tanh"}
_GEMMA3: dict[str, float] = {"max_position_embeddings": 131072, "num_attention_heads": 8, "num_key_value_heads": 4}
_GEMMA3 |= {"sliding_window": 4096, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "vocab_size": 262208}
_LLAMA_LAYERS = {**_ATTENTION, **_FEED_FORWARD, **_NORMS}
_QWEN_MOE = {**_ATTENTION, **_NORMS, **_EXPERTS}
_OUTSIDE_FFN = ("attn_", "output")
_GELU = ("gelu_pytorch_tanh", "gelu_new")

ARCHITECTURES: dict[str, Architecture] = {  # by transformers' model_type
    "llama": Architecture("llama", _LLAMA_LAYERS, permuted=True),
    "mistral": Architecture("llama", _LLAMA_LAYERS, permuted=True),
    "mixtral": Architecture("llama", {**_ATTENTION, **_NORMS, **_MIXTRAL}, {"rope_theta": 1e6}, permuted=True),
    "qwen2": Architecture("qwen2", _LLAMA_LAYERS, factors=_OUTSIDE_FFN),
    "qwen3": Architecture("qwen3", {**_LLAMA_LAYERS, **_HEAD_NORMS}),
    "qwen2_moe": Architecture(
        "qwen2moe",
        {**_QWEN_MOE, **_SHARED},
        {"norm_topk_prob": False},
        factors=_OUTSIDE_FFN,
        problems=_no_normalized_routing,
    ),
    "qwen3_moe": Architecture("qwen3moe", {**_QWEN_MOE, **_HEAD_NORMS}, problems=_normalized_routing),
    "gemma2": Architecture(
        "gemma2",
        {**_ATTENTION, **_FEED_FORWARD, **_GEMMA_NORMS},
        {**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096},
        shifted=True,
        activations=_GELU,
        factors=_OUTSIDE_FFN,
        problems=_gemma_scale,
    ),
    "gemma3_text": Architecture(
        "gemma3",
        {**_ATTENTION, **_FEED_FORWARD, **_GEMMA_NORMS, **_HEAD_NORMS},
        {**_GEMMA, **_GEMMA3},
        shifted=True,
        activations=_GELU,
        factors=_OUTSIDE_FFN,
        problems=_gemma_scale,
    ),
    "phi3": Architecture("phi3", {**_FUSED, **_NORMS}, factors=_OUTSIDE_FFN),
}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a config.json.

    Raises:
        ValueError: it is none of those above, or one of another meaning than llama.cpp's.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"the architecture {kind!r} is not known here as GGUF, only {known}")
    return ARCHITECTURES[kind]


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with what it leaves out, as transformers takes it. rope: the parameters of its rotary embedding, by the
    kind of attention where these differ."""
    architecture = architecture_of(config)
    full = {**architecture.defaults, **{key: value for key, value in config.items() if value is not None}}
    full.setdefault("rms_norm_eps", 1e-6)
    full.setdefault("num_key_value_heads", full["num_attention_heads"])
    full.setdefault("head_dim", full["hidden_size"] // full["num_attention_heads"])
    full["hidden_act"] = full.get("hidden_activation", full.get("hidden_act", "silu"))
    parameters = dict(full.get("rope_parameters") or full.get("rope_scaling") or {})
    kinds = {kind: dict(own) for kind, own in parameters.items() if isinstance(own, dict)}
    if not kinds:
        kinds = {"full_attention": parameters}
        if "rope_local_base_freq" in full:
            kinds["sliding_attention"] = {"rope_theta": full["rope_local_base_freq"]}
    kinds["full_attention"].setdefault("rope_theta", full.get("rope_theta", 10000.0))
    for own in kinds.values():
        own["rope_type"] = own.get("rope_type", own.get("type", "default"))
    return full | {"rope": kinds}


def problems(config: Mapping[str, Any]) -> list[str]:
    """Why llama.cpp cannot run a model of this config; [] where it can."""
    try:
        architecture, full = architecture_of(config), complete(config)
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        return [str(error) if isinstance(error, ValueError) else f"config.json lacks {error}"]
    reasons = list(architecture.problems(full))
    if full["hidden_act"] not in architecture.activations:
        reasons.append(f"hidden_act is {full['hidden_act']!r}, and llama.cpp has {architecture.activations[0]}")
    kind = full["rope"]["full_attention"]["rope_type"]
    if kind not in _SCALINGS:
        reasons.append(f"the rotary embedding is scaled by {kind!r}, and {', '.join(_SCALINGS)} are known here")
    if full["rope"].get("sliding_attention", {}).get("rope_type", "default") != "default":
        reasons.append("the rotary embedding of sliding attention is scaled, which llama.cpp has no key for")
    return reasons


_SCALINGS = ("default", "linear", "yarn", "llama3", "longrope", "su")


def model_metadata(config: Mapping[str, Any]) -> Metadata:
    """The keys that say what a model of this config computes.

    Raises:
        KeyError: the config lacks one.
    """
    architecture, full = architecture_of(config), complete(config)
    own = architecture.name
    rope = full["rope"]["full_attention"]
    metadata: Metadata = {
        "general.architecture": own,
        f"{own}.block_count": int(full["num_hidden_layers"]),
        f"{own}.context_length": int(full["max_position_embeddings"]),
        f"{own}.embedding_length": int(full["hidden_size"]),
        f"{own}.feed_forward_length": int(full["intermediate_size"]),
        f"{own}.attention.head_count": int(full["num_attention_heads"]),
        f"{own}.attention.head_count_kv": int(full["num_key_value_heads"]),
        f"{own}.attention.layer_norm_rms_epsilon": float(full["rms_norm_eps"]),
        f"{own}.attention.key_length": int(full["head_dim"]),
        f"{own}.attention.value_length": int(full["head_dim"]),
        f"{own}.rope.freq_base": float(rope["rope_theta"]),
        f"{own}.vocab_size": int(full["vocab_size"]),
    }
    rotary = rope.get("partial_rotary_factor", full.get("partial_rotary_factor", 1.0))
    metadata[f"{own}.rope.dimension_count"] = int(rotary * full["head_dim"])
    metadata |= {f"{own}.rope.scaling.{key}": value for key, value in _scaling(rope, full).items()}
    if (local := full["rope"].get("sliding_attention")) is not None:
        metadata[f"{own}.rope.freq_base_swa"] = float(local["rope_theta"])
    for key, name in (("attn_logit_softcapping", "attn_logit_softcapping"), ("final_logit_softcapping",) * 2):
        if architecture.shifted and full.get(key):
            metadata[f"{own}.{name}"] = float(full[key])
    if architecture.shifted or own == "phi3":  # others of llama.cpp read no window
        metadata[f"{own}.attention.sliding_window"] = int(full.get("sliding_window") or 0)
    if any("{e}" in layer for layer in architecture.layers):
        experts = full["num_local_experts"] if "num_local_experts" in full else full["num_experts"]
        metadata[f"{own}.expert_count"] = int(experts)
        metadata[f"{own}.expert_used_count"] = int(full["num_experts_per_tok"])
        if "moe_intermediate_size" in full:
            metadata[f"{own}.expert_feed_forward_length"] = int(full["moe_intermediate_size"])
        if "shared_expert_intermediate_size" in full:
            metadata[f"{own}.expert_shared_feed_forward_length"] = int(full["shared_expert_intermediate_size"])
    return metadata


def _scaling(rope: Mapping[str, Any], full: Mapping[str, Any]) -> Metadata:
    """The keys under rope.scaling; llama3's factors are a tensor instead."""
    kind = rope["rope_type"]
    original = rope.get("original_max_position_embeddings", full.get("original_max_position_embeddings"))
    if kind == "linear":
        return {"type": "linear", "factor": float(rope["factor"])}
    if kind == "yarn":
        scaling = {"type": "yarn", "factor": float(rope["factor"])}
        scaling["original_context_length"] = int(original or full["max_position_embeddings"])
        others = {"attention_factor": "attn_factor", "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
        return scaling | {name: float(rope[key]) for key, name in others.items() if rope.get(key) is not None}
    if kind in ("longrope", "su"):
        scale = full["max_position_embeddings"] / original
        factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        return {"type": "longrope", "original_context_length": int(original), "attn_factor": factor}
    return {"original_context_length": int(original or full["max_position_embeddings"])} if _is_phi(full) else {}


def _is_phi(full: Mapping[str, Any]) -> bool:
    return ARCHITECTURES[full["model_type"]].name == "phi3"


def generated_tensors(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that llama.cpp reads of a config's rotary embedding: what each frequency is divided by, float32."""
    full = complete(config)
    rope = full["rope"]["full_attention"]
    if rope["rope_type"] in ("longrope", "su"):
        return {
            f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"]).float() for kind in ("long", "short")
        }
    if rope["rope_type"] != "llama3":
        return {}
    size = full["head_dim"]
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    frequencies = 1.0 / (float(rope["rope_theta"]) ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # within the original context
    smooth = (turns - low) / (high - low)
    factors = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(turns > high, 1.0, torch.where(turns < low, factor, factors))
    return {"rope_freqs.weight": factors}
