"""FP8 and NVFP4 as NVIDIA's ModelOpt publishes them: described in config.json, in hf_quant_config.json, or in both.

Source: modelopt/torch/export of ModelOpt.
"""

from collections.abc import Mapping
from typing import Any

from ..tensor_info import TensorInfo
from .base import PER_CHANNEL, PER_TENSOR, SQUARES, Block, Coding, Source, float8_coding, packed_coding

_SIDE_FILE = "hf_quant_config.json"
_BLOCKS: dict[str, tuple[Block, ...]] = {
    "FP8": (PER_TENSOR,),
    "FP8_PER_CHANNEL_PER_TOKEN": (PER_CHANNEL,),
    "FP8_PB_WO": (SQUARES,),
    "MXFP8": ((1, 32),),
}
_NVFP4 = ("NVFP4", "W4A16_NVFP4")


class ModelOpt(Source):
    """`quant_algo` says what a scale serves."""

    name = "modelopt"
    rank = 30
    quant_methods = ("modelopt",)
    side_files = (_SIDE_FILE,)

    def section(self, config: Mapping[str, Any], side_files: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
        if config.get("quantization_config") is not None:
            own = super().section(config, side_files) or {}
            inner = own.get("quantization", own)  # as the side file has it, in some
            return inner if isinstance(inner, dict) and inner else None
        section = side_files.get(_SIDE_FILE, {}).get("quantization")
        return section if isinstance(section, dict) and section.get("quant_algo") else None

    def coding(self, section: Mapping[str, Any], stored: Mapping[str, TensorInfo]) -> Coding:
        algorithm = section.get("quant_algo")
        if algorithm in _NVFP4:
            return packed_coding(stored, "weight", 16, "weight_scale_2")
        if not isinstance(algorithm, str) or algorithm not in _BLOCKS:
            return Coding(problems=[f"quant_algo is {algorithm!r}; bitpress reads {', '.join([*_BLOCKS, *_NVFP4])}"])
        return float8_coding(stored, _BLOCKS[algorithm])


PLUGINS = (ModelOpt(),)
