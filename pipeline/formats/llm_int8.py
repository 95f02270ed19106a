"""LLM.int8 as bitsandbytes and transformers save it (Dettmers et al. 2022): int8 weights with a scale for each output.

It is read, and written in no format but others: bitsandbytes' float32 SCB is 127 times a scale, and not every scale is
what a float32 number divided by 127 gives.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme

from .base import Examination, Facts, Format, Loading, Reason, SchemeRules, integer_scheme, require
from .names import NameRules

_LARGEST = 127.0  # the code of a row's largest magnitude, which is its SCB
_PLAIN_ROWS = 0  # what weight_format says; the others are layouts of old kernels
_INPUTS = (
    "bitsandbytes also rounds the inputs of these layers to 8 bits, but for columns beyond llm_int8_threshold; "
    "bitpress leaves inputs as they are"
)


class LLMInt8(Format):
    """weight int8 [out, in], SCB float32 [out], weight_format uint8 []. A weight is element * SCB / 127."""

    name = "llm-int8"
    rank = 95
    quant_method = "bitsandbytes"
    tags = ("llm-int8",)
    hf_methods = ("bitsandbytes_8bit",)
    uncuttable = "how runtimes cut bitsandbytes' layers is not documented"
    marker = "SCB"
    suffixes = ("weight", "SCB", "weight_format")
    read_only = True

    def problems(self, scheme: Scheme, shape: tuple[int, ...]) -> list[str]:
        return [f"{self.name} is read, and not written; int8-channel as compressed-tensors has the same numbers"]

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def write(self, qtensor: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
        raise AssertionError("problems() refuses every scheme")

    def read(self, scheme: Scheme, tensors: dict[str, Tensor]) -> QTensor:
        weight, peaks = tensors["weight"], tensors["SCB"].flatten()
        require(weight.dim() == 2, f"weight has shape {list(weight.shape)}, expected two dimensions")
        rows = (weight.shape[0],)
        require(peaks.dtype == torch.float32, f"SCB has dtype {peaks.dtype}, expected torch.float32")
        require(peaks.shape == rows, f"SCB has shape {list(peaks.shape)}, expected {list(rows)}")
        if (layout := tensors.get("weight_format")) is not None:
            require(layout.numel() == 1, f"weight_format has shape {list(layout.shape)}, expected one number")
            require(layout.item() == _PLAIN_ROWS, f"weight_format is {layout.item()}; only plain rows, 0, are read")
        scales = (peaks / _LARGEST).unsqueeze(1)
        own = scheme.weight.from_elements((weight.shape[0], weight.shape[1]), weight, scales, None)
        return QTensor.of(scheme, (weight.shape[0], weight.shape[1]), own)

    def quantization_config(
        self, schemes: Mapping[str, Scheme], kept: Sequence[str], dtype: torch.dtype, ordered: bool = False
    ) -> dict[str, Any]:
        raise AssertionError("problems() refuses every scheme")

    def scheme_rules(self, config: dict[str, Any]) -> SchemeRules:
        require(config.get("load_in_8bit") is True, f"load_in_8bit is {config.get('load_in_8bit')!r}, expected true")
        return NameRules(integer_scheme(8, None, True))

    def kept(self, config: dict[str, Any]) -> list[str]:
        skipped = config.get("llm_int8_skip_modules")
        return [name for name in skipped if isinstance(name, str)] if isinstance(skipped, list) else []

    def diagnose(self, seen: Examination) -> tuple[list[str], list[str]]:
        return [], [_INPUTS]

    def runtimes(self, facts: Facts) -> dict[str, Loading]:
        plug_in: Reason = ("unknown", "bitsandbytes is a plug-in there (vllm-bnb-plugin), and this was not tried")
        untried: Reason = ("unknown", "it reads bitsandbytes, and LLM.int8 was not tried")
        readers = {
            "transformers": Loading(needs="bitsandbytes"),
            "vLLM": Loading([plug_in], needs="vllm-bnb-plugin, bitsandbytes"),
            "SGLang": Loading([untried], needs="bitsandbytes"),
            "TensorRT-LLM": Loading([("unknown", "its documents do not name bitsandbytes")]),
        }
        for name, what in (("llama.cpp", "its converter"), ("MLX", "mlx-lm"), ("ORT GenAI", "its builder")):
            readers[name] = Loading([("no", f"{what} does not read bitsandbytes")])
        return readers


PLUGINS = (LLMInt8(),)
