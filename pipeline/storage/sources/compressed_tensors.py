"""FP8, MXFP4 and NVFP4 as llm-compressor publishes them: compressed-tensors whose weights are floats.

Source: QuantizationArgs and quantization/utils of the package compressed-tensors.
"""

from collections.abc import Mapping
from typing import Any

from ..tensor_info import TensorInfo
from .base import PER_CHANNEL, PER_TENSOR, Block, Coding, Source, block_size, float8_coding, packed_coding


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
        if kinds == {"4 tensor_group 16"}:  # NVFP4
            return packed_coding(stored, "weight_packed", 16, "weight_global_scale", divides=True)
        if kinds == {"4 group 32"}:  # MXFP4
            return packed_coding(stored, "weight_packed", 32)
        if odd := sorted(kind for kind in kinds if not kind.startswith("8 ")):
            return Coding(
                problems=[f"its floats are of num_bits, strategy, group_size {odd[0]}; 8 bits, NVFP4 or MXFP4 are read"]
            )
        blocks = {block: None for weights in _weights(section) if (block := _block(weights))}
        if not blocks:
            return Coding(problems=["no config group has a strategy: tensor, channel, block with its block_structure"])
        return float8_coding(stored, list(blocks))


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
