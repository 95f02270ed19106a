"""FP8, MXFP4 and NVFP4 as llm-compressor publishes them: compressed-tensors whose weights are floats.

Source: QuantizationArgs and quantization/utils of the package compressed-tensors.
"""

from collections.abc import Mapping
from typing import Any

from ..tensor_info import TensorInfo
from .base import (
    PER_CHANNEL,
    PER_TENSOR,
    Block,
    Coding,
    Source,
    block_size,
    float8_coding,
    packed_coding,
    set_aside,
)

_PACKED, _DIVISOR = "weight_packed", "weight_global_scale"
_NVFP4, _MXFP4 = "4 tensor_group 16", "4 group 32"


class FloatQuantized(Source):
    """Each group of the config has a strategy; the shape of a weight's scales must be that of one of them."""

    name = "compressed-tensors floats"
    rank = 20
    quant_methods = ("compressed-tensors",)

    def section(self, config: Mapping[str, Any], side_files: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
        section = super().section(config, side_files)
        weights = _weights(section or {})
        return section if weights and all(each.get("type") == "float" for each in weights) else None

    def coding(self, section: Mapping[str, Any], stored: Mapping[str, TensorInfo]) -> Coding:
        keys = ("num_bits", "strategy", "group_size")
        kinds = {" ".join(str(weights.get(key)) for key in keys) for weights in _weights(section)}
        if odd := sorted(kind for kind in kinds - {_NVFP4, _MXFP4} if not kind.startswith("8 ")):
            return Coding(
                problems=[f"its floats are of num_bits, strategy, group_size {odd[0]}; 8 bits, NVFP4 or MXFP4 are read"]
            )
        packed = {name.removesuffix(f".{_PACKED}") for name in stored if name.endswith(f".{_PACKED}")}
        divided = {stem for stem in packed if kinds == {_NVFP4} or f"{stem}.{_DIVISOR}" in stored}
        blocks = {block: None for weights in _weights(section) if (block := _block(weights))}
        parts: list[Coding] = []
        if _NVFP4 in kinds:
            parts.append(packed_coding(_of(stored, divided), _PACKED, 16, _DIVISOR, divides=True))
        if _MXFP4 in kinds:
            parts.append(packed_coding(_of(stored, packed - divided), _PACKED, 32))
        plain = {name: info for name, info in stored.items() if name.rpartition(".")[0] not in packed}
        if blocks and kinds - {_NVFP4, _MXFP4}:
            parts.append(float8_coding(plain, list(blocks)))
        elif kinds <= {_NVFP4, _MXFP4}:
            set_aside(rest := Coding(), plain, ())
            parts.append(rest)
        else:
            return Coding(problems=["no config group has a strategy: tensor, channel, block with its block_structure"])
        coding = Coding()
        for part in parts:
            coding.weights |= part.weights
            coding.problems += part.problems
            coding.other_scales += part.other_scales
        return coding


def _of(stored: Mapping[str, TensorInfo], stems: set[str]) -> dict[str, TensorInfo]:
    """The tensors of these layers."""
    return {name: info for name, info in stored.items() if name.rpartition(".")[0] in stems}


def _weights(section: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the config groups say of their weights; {} for a group that says nothing that can be read."""
    groups = section.get("config_groups")
    entries = groups.values() if isinstance(groups, dict) else []
    weights = [entry.get("weights") if isinstance(entry, dict) else None for entry in entries]
    return [each if isinstance(each, dict) else {} for each in weights]


def _block(weights: Mapping[str, Any]) -> Block | None:
    size = weights.get("group_size")
    group = (1, size) if type(size) is int and size > 0 else None
    strategies = {
        "tensor": PER_TENSOR,
        "channel": PER_CHANNEL,
        "block": block_size(weights.get("block_structure")),
        "group": group,
    }
    return strategies.get(str(weights.get("strategy")))


PLUGINS = (FloatQuantized(),)
