"""GPTQ's format, version 1: the layout that AutoGPTQ began and GPTQModel, vLLM, SGLang and transformers load.

Per layer: qweight int32 [ceil(in * bits / 32), out], codes packed along the inputs; qzeros int32
[groups, ceil(out * bits / 32)], zero points MINUS ONE packed along the outputs; scales float16 [groups, out];
g_idx int32 [in], the group of each input feature.
"""

from typing import Any

import torch
from torch import Tensor

from bitpress.kernels.packing import pack, unpack, words
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme

from . import integer_scheme, require

_PER_WORD = 32  # every bit width packs a multiple of 32 codes into whole words


class GPTQ:
    name = "gptq"
    quant_method = "gptq"
    marker = "qweight"
    suffixes = ("qweight", "qzeros", "scales", "g_idx")

    def problems(self, scheme: Scheme, shape: tuple[int, ...]) -> list[str]:
        if scheme.code != "int" or scheme.activations:
            return [f"{self.name} holds weight-only integers, not {scheme.name}"]
        if not scheme.symmetric:
            return [f"{self.name} version 1 cannot hold a zero point of 0; use format compressed-tensors"]
        if any(size % _PER_WORD for size in shape):
            return [
                f"{self.name} needs multiples of {_PER_WORD}, got shape {list(shape)}; use format compressed-tensors"
            ]
        return []

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        return torch.float16

    def write(self, qtensor: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
        out_features, in_features = qtensor.shape
        scheme, groups = qtensor.scheme, qtensor.scales.shape[1]
        zeros = torch.full((groups, out_features), scheme.middle - 1, dtype=torch.uint8)
        return {
            "qweight": qtensor.codes.t().contiguous(),
            "qzeros": pack(zeros, scheme.bits),
            "scales": qtensor.scales.t().contiguous(),
            "g_idx": torch.arange(in_features, dtype=torch.int32) // (in_features // groups),
        }

    def read(self, scheme: Scheme, tensors: dict[str, Tensor]) -> QTensor:
        qweight, qzeros, scales, g_idx = (tensors[suffix] for suffix in self.suffixes)
        ranks = [tensor.dim() for tensor in (qweight, qzeros, scales, g_idx)]
        require(ranks == [2, 2, 2, 1], f"{', '.join(self.suffixes)} have {ranks} dimensions, expected [2, 2, 2, 1]")
        dtypes = {qzeros.dtype, g_idx.dtype}
        require(dtypes == {torch.int32}, "qzeros or g_idx is not of dtype torch.int32")
        out_features, in_features = scales.shape[1], g_idx.numel()
        groups = scheme.groups(in_features)
        expected = torch.arange(in_features, dtype=torch.int32) // max(in_features // groups, 1) if groups else g_idx
        require(
            torch.equal(g_idx, expected), "g_idx is not in order (activation order with groups is not supported yet)"
        )
        size = (scales.shape[0], words(out_features, scheme.bits))
        require(qzeros.shape == size, f"qzeros has shape {list(qzeros.shape)}, expected {list(size)}")
        zeros = unpack(qzeros, scheme.bits, out_features)
        # Some files are tagged version 1 and hold version 2's zeros; a symmetric scheme has one value for all.
        require(
            bool((zeros == scheme.middle - 1).all()),
            f"qzeros hold {sorted(set(zeros.flatten().tolist()))[:4]}, expected {scheme.middle - 1} everywhere "
            f"(symmetric, version 1); {scheme.middle} would be version 2",
        )
        return QTensor(scheme, (out_features, in_features), qweight.t().contiguous(), scales.t().contiguous())

    def quantization_config(self, scheme: Scheme, kept: list[str], dtype: torch.dtype) -> dict[str, Any]:
        inside = [name for name in kept if name != "lm_head"]
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": scheme.bits,
            "group_size": scheme.group_size or -1,
            "sym": True,
            "desc_act": False,
            "lm_head": False,
            "pack_dtype": "int32",
            "meta": {"quantizer": ["bitpress"]},
        }
        if inside:
            config["dynamic"] = {f"-:^{name.replace('.', chr(92) + '.')}$": {} for name in inside}
        return config

    def scheme(self, config: dict[str, Any]) -> Scheme:
        version = config.get("checkpoint_format", "gptq")
        require(version == "gptq", f"checkpoint_format {version!r} is not supported yet, only 'gptq'")
        require(config.get("sym") is True, "asymmetric GPTQ (sym: false) is not supported yet")
        size = config["group_size"]
        return integer_scheme(config["bits"], None if size == -1 else size, True)
