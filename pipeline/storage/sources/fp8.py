"""FP8 as DeepSeek-V3 and Qwen3 publish it, and its kin: float8 weights, the scales that multiply them beside each.

Sources: the config classes FineGrainedFP8Config and FbgemmFp8Config of transformers; DeepSeek-V3's inference/kernel.py.
"""

from collections.abc import Mapping
from typing import Any

from ..tensor_info import TensorInfo
from .base import PER_CHANNEL, PER_TENSOR, SQUARES, Coding, Source, block_size, float8_coding

_MICROSCALING = (1, 32)


class Fp8(Source):
    """`weight_block_size` says which block a scale serves; where it is absent, the shapes tell."""

    name = "fp8"
    rank = 10
    quant_methods = ("fp8", "mxfp8", "fbgemm_fp8")

    def coding(self, section: Mapping[str, Any], stored: Mapping[str, TensorInfo]) -> Coding:
        wanted = section.get("weight_block_size")
        if wanted is None:
            return float8_coding(stored, (PER_TENSOR, PER_CHANNEL, SQUARES, _MICROSCALING))
        if (block := block_size(wanted)) is None:
            return Coding(problems=[f"weight_block_size is {wanted!r}, expected two whole numbers such as [128, 128]"])
        return float8_coding(stored, (block,), (_MICROSCALING,))  # DeepSeek-V4 has its experts in MXFP4 beside that


PLUGINS = (Fp8(),)
