"""bitsandbytes' NF4 as transformers saves it: plain tensors and a small JSON; writing needs no package."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme
from bitpress.kernels.weights.nf4 import NESTED_BLOCK, NF4, NF4_BLOCK, NF4_CODEBOOK, NestedScales, nested_scales

from .base import Facts, Format, Loading, SchemeRules, dtype_name, require
from .names import NameRules

_TYPE = "nf4"  # what bitsandbytes calls it
_STATE = "weight.quant_state.bitsandbytes__nf4"
_STATE_LIMIT = 4096  # bytes of JSON
_STORAGE = (torch.bfloat16, torch.float16, torch.float32)  # in whose elements the bytes of codes may lie


_DOUBLE_QUANT = {Scheme(NF4()): False, Scheme(NF4(double_quant=True)): True}  # the schemes that it holds


class BitsAndBytes(Format):
    """weight uint8 [ceil(out * in / 2), 1], the even element in the high nibble; weight.absmax per block of 64 of the
    flattened matrix; with double quantization, absmax is uint8 and weight.nested_* tell how to decode it. Some have
    the bytes of weight as bfloat16, float16 or float32 (bnb_4bit_quant_storage), which FSDP cuts into pieces."""

    name = "bitsandbytes"
    rank = 30
    quant_method = "bitsandbytes"
    tags = ("bitsandbytes",)
    hf_methods = ("bitsandbytes_4bit",)
    uncuttable = "how runtimes cut bitsandbytes' blocks is not documented"
    marker = _STATE
    suffixes = (
        "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", _STATE,
    )  # fmt: skip

    def problems(self, scheme: Scheme, shape: tuple[int, ...]) -> list[str]:
        return [] if scheme in _DOUBLE_QUANT else [f"{self.name} holds nf4, not {scheme.name}"]

    def mixture_problems(self, schemes: Mapping[str, Scheme]) -> list[str]:
        names = list(dict.fromkeys(scheme.name for scheme in schemes.values()))
        return [f"{self.name} holds one scheme for all layers, not {' and '.join(names)}"] if len(names) > 1 else []

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def write(self, qtensor: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
        state: dict[str, Any] = {
            "quant_type": _TYPE,
            "blocksize": NF4_BLOCK,
            "dtype": dtype_name(dtype),
            "shape": list(qtensor.shape),
        }
        tensors = {
            "weight": qtensor.codes.unsqueeze(1),
            "weight.absmax": qtensor.scales,
            "weight.quant_map": torch.tensor(NF4_CODEBOOK),
        }
        if (nested := nested_scales(qtensor.extra)) is not None:
            state |= {
                "nested_blocksize": NESTED_BLOCK,
                "nested_dtype": "float32",
                "nested_offset": nested.offset.item(),
            }
            tensors["weight.nested_absmax"] = nested.absmax
            tensors["weight.nested_quant_map"] = nested.codebook
        tensors[_STATE] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
        return tensors

    def read(self, scheme: Scheme, tensors: dict[str, Tensor]) -> QTensor:
        packed = tensors[_STATE]
        require(packed.dtype == torch.uint8 and packed.numel() <= _STATE_LIMIT, "the quant_state is not a short JSON")
        state = json.loads(bytes(packed.flatten().tolist()))
        require(isinstance(state, dict), "the quant_state is not a JSON object")
        require(state.get("quant_type") == _TYPE, f"quant_type is {state.get('quant_type')!r}, expected {_TYPE!r}")
        require(state.get("blocksize") == NF4_BLOCK, f"blocksize is {state.get('blocksize')!r}, expected {NF4_BLOCK}")
        shape = state.get("shape")
        fits = isinstance(shape, list) and len(shape) == 2 and all(isinstance(n, int) and n > 0 for n in shape)
        require(fits, f"shape is {shape!r}")
        quant_map = tensors["weight.quant_map"].flatten()
        same = quant_map.dtype == torch.float32 and torch.equal(quant_map, torch.tensor(NF4_CODEBOOK))
        require(same, "weight.quant_map is not NF4's code book in float32")
        codes = tensors["weight"].flatten()
        codes = codes.view(torch.uint8) if codes.dtype in _STORAGE else codes
        return QTensor(
            scheme, (shape[0], shape[1]), codes, tensors["weight.absmax"].flatten(), extra=self._nested(state, tensors)
        )

    def _nested(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if not {"weight.nested_absmax", "weight.nested_quant_map"} & tensors.keys():
            return {}
        size, offset = state.get("nested_blocksize"), state.get("nested_offset")
        require(size == NESTED_BLOCK, f"nested_blocksize is {size!r}, expected {NESTED_BLOCK}")
        require(isinstance(offset, float), f"nested_offset is {offset!r}")
        absmax, codebook = tensors["weight.nested_absmax"], tensors["weight.nested_quant_map"]
        return NestedScales(absmax, codebook, torch.tensor(offset, dtype=torch.float32)).tensors()

    def quantization_config(
        self, schemes: Mapping[str, Scheme], kept: Sequence[str], dtype: torch.dtype, ordered: bool = False
    ) -> dict[str, Any]:
        (scheme,) = set(schemes.values())
        return {
            "quant_method": "bitsandbytes",
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": _TYPE,
            "bnb_4bit_use_double_quant": _DOUBLE_QUANT[scheme],
            "bnb_4bit_compute_dtype": dtype_name(dtype),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": [name for name in kept if not name.startswith("re:")] or None,
            "llm_int8_threshold": 6.0,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
        }

    def scheme_rules(self, config: dict[str, Any]) -> SchemeRules:
        kind = config.get("bnb_4bit_quant_type")
        require(config.get("load_in_4bit") is True and kind == _TYPE, f"only NF4 is read, this is {kind or '8-bit'}")
        return NameRules(Scheme(NF4(double_quant=bool(config.get("bnb_4bit_use_double_quant")))))

    def kept(self, config: dict[str, Any]) -> list[str]:
        skipped = config.get("llm_int8_skip_modules")
        return [name for name in skipped if isinstance(name, str)] if isinstance(skipped, list) else []

    def runtimes(self, facts: Facts) -> dict[str, Loading]:
        readers = {name: Loading(needs="bitsandbytes") for name in ("transformers", "SGLang")}
        plug_in = ("yes", "by a plug-in: bitsandbytes is no part of it any more")
        readers["vLLM"] = Loading([plug_in], needs="vllm-bnb-plugin, bitsandbytes")
        for name, what in (("llama.cpp", "its converter"), ("MLX", "mlx-lm"), ("ORT GenAI", "its builder")):
            readers[name] = Loading([("no", f"{what} does not read bitsandbytes")])
        readers["TensorRT-LLM"] = Loading([("unknown", "its documents do not name bitsandbytes")])
        if facts.experts:
            stops = ("no", "it stops at experts, whose packed bytes it joins as if they were weights")
            readers["transformers"] = Loading([stops], needs="bitsandbytes")
        return readers


PLUGINS = (BitsAndBytes(),)
