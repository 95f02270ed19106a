"""GPTQ's format, versions 1 and 2: the layout that AutoGPTQ began and GPTQModel, vLLM, SGLang and transformers load.

Per layer: qweight int32 [ceil(in * bits / 32), out], codes packed along the inputs; qzeros int32
[groups, ceil(out * bits / 32)], zero points packed along the outputs, in version 1 MINUS ONE; scales float16
[groups, out]; g_idx int32 [in], the group of each input feature.
"""

from typing import Any

import torch
from torch import Tensor

from bitpress.kernels.packing import pack, unpack, words
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme

from .act_order import gather_codes, read_order, scatter_codes, write_groups
from .base import integer_scheme, require

_PER_WORD = 32  # every bit width packs a multiple of 32 codes into whole words
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # a word with a 1 in the place of every code


class GPTQ:
    """Version 1; symmetric only, because a stored zero point of -1 runs into its neighbour's bits."""

    name = "gptq"
    quant_method = "gptq"
    tags: tuple[str, ...] = ("gptq",)
    marker = "qweight"
    suffixes = ("qweight", "qzeros", "scales", "g_idx")
    holds_order = True
    offset = 1  # what zero points are stored minus

    def problems(self, scheme: Scheme, shape: tuple[int, ...]) -> list[str]:
        if scheme.code != "int" or scheme.activations:
            return [f"{self.name} holds weight-only integers, not {scheme.name}"]
        if self.offset and not scheme.symmetric:
            return [
                f"{self.name} version 1 cannot hold a zero point of 0; use format compressed-tensors"
                " or, for runtimes that read it, gptq-v2"
            ]
        if any(size % _PER_WORD for size in shape):
            return [
                f"{self.name} needs multiples of {_PER_WORD}, got shape {list(shape)}; use format compressed-tensors"
            ]
        return []

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        return torch.float16

    def write(self, qtensor: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
        assert not (self.offset and qtensor.zeros is not None), "problems() refuses what would wrap around below"
        out_features, in_features = qtensor.shape
        scheme, groups = qtensor.scheme, qtensor.scales.shape[1]
        zeros = torch.full((groups, out_features), scheme.middle, dtype=torch.uint8)
        if qtensor.zeros is not None:
            zeros = qtensor.zeros.t()
        return {
            "qweight": scatter_codes(qtensor.codes, qtensor.order, scheme.bits).t().contiguous(),
            "qzeros": pack(zeros - self.offset, scheme.bits),
            "scales": qtensor.scales.t().contiguous(),
            "g_idx": write_groups(qtensor.order, in_features, groups),
        }

    def read(self, scheme: Scheme, tensors: dict[str, Tensor]) -> QTensor:
        qweight, qzeros, scales, g_idx = (tensors[suffix] for suffix in self.suffixes)
        ranks = [tensor.dim() for tensor in (qweight, qzeros, scales, g_idx)]
        require(ranks == [2, 2, 2, 1], f"{', '.join(self.suffixes)} have {ranks} dimensions, expected [2, 2, 2, 1]")
        out_features, in_features = scales.shape[1], g_idx.numel()
        order = read_order("g_idx", g_idx, scheme)
        require(qzeros.dtype == torch.int32, f"qzeros has dtype {qzeros.dtype}, expected torch.int32")
        size = (scales.shape[0], words(out_features, scheme.bits))
        require(qzeros.shape == size, f"qzeros has shape {list(qzeros.shape)}, expected {list(size)}")
        zeros = None
        if scheme.symmetric:
            self.stored_zero(scheme, qzeros, out_features)
        else:
            zeros = self._zeros(qzeros, scheme.bits, out_features).t().contiguous()
        codes = gather_codes(qweight.t(), order, scheme.bits)  # a view: transposing takes longer than reading
        return QTensor(scheme, (out_features, in_features), codes, scales.t().contiguous(), zeros, order=order)

    @staticmethod
    def stored_zero(scheme: Scheme, qzeros: Tensor, out_features: int) -> int | None:
        """The one zero point that a symmetric layer stores, whatever version its file claims; None without groups.

        Some files are tagged version 1 and hold version 2's zeros, or the reverse. Symmetric zeros are known, so
        either is read right.

        Raises:
            ValueError: they differ, or are neither version's.
        """
        stored = unpack(qzeros, scheme.bits, out_features)
        expected = (scheme.middle - 1, scheme.middle)
        limits = [int(limit) for limit in stored.aminmax()] if stored.numel() else []
        if limits not in ([], [expected[0]] * 2, [expected[1]] * 2):
            found = ", ".join(map(str, stored.unique().tolist()[:4]))
            raise ValueError(
                f"qzeros hold {found}, expected {expected[0]} (version 1) or {expected[1]} (version 2) everywhere, "
                "as the scheme is symmetric"
            )
        return limits[0] if limits else None

    def _zeros(self, qzeros: Tensor, bits: int, out_features: int) -> Tensor:
        """uint8 [groups, out]. Version 1's writers subtract from whole words, so a borrow is undone by adding to them.

        3-bit codes straddle words; they were subtracted from one by one.
        """
        if self.offset and bits in _ONES:
            qzeros = qzeros + _ONES[bits]
        zeros = unpack(qzeros, bits, out_features)
        return (zeros + 1) & 7 if self.offset and bits == 3 else zeros

    def quantization_config(self, scheme: Scheme, kept: list[str], dtype: torch.dtype) -> dict[str, Any]:
        inside = [name for name in kept if name != "lm_head"]
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "checkpoint_format": self.tags[0],
            "bits": scheme.bits,
            "group_size": scheme.group_size or -1,
            "sym": scheme.symmetric,
            "desc_act": False,
            "lm_head": False,
            "pack_dtype": "int32",
            "meta": {"quantizer": ["bitpress"]},
        }
        if inside:
            config["dynamic"] = {f"-:^{name.replace('.', chr(92) + '.')}$": {} for name in inside}
        return config

    def scheme(self, config: dict[str, Any]) -> Scheme:
        version = config.get("checkpoint_format", config.get("format", "gptq"))
        require(version in self.tags, f"checkpoint_format {version!r} is not supported, only 'gptq' and 'gptq_v2'")
        dynamic = config.get("dynamic") or {}
        require(isinstance(dynamic, dict), f"dynamic is {dynamic!r}, expected an object")
        mixed = [pattern for pattern in dynamic if not pattern.startswith("-:")]
        require(
            not mixed, f"dynamic gives layers like {', '.join(mixed[:3])} settings of their own, which is not supported"
        )
        size = config["group_size"]
        return integer_scheme(config["bits"], None if size == -1 else size, config["sym"])


class GPTQv2(GPTQ):
    """Version 2: zero points as they are, so asymmetric layers too."""

    name = "gptq-v2"
    tags = ("gptq_v2",)
    offset = 0
