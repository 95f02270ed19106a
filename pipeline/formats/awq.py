"""AWQ's format, version "gemm": what AutoAWQ began, and vLLM, SGLang, MLX and ONNX Runtime's builder load.

Per layer: qweight int32 [in, out / 8], codes of 4 bits packed along the outputs; qzeros int32 [groups, out / 8], zero
points packed alike; scales float16 [groups, out]. The eight codes of a word lie in an order of their own. The channel
scales that AWQ searches for are part of the weights and norms when a checkpoint is saved, so nothing tells of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitpress.kernels.packing import pack, unpack
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme

from .base import (
    HEAD_IS_ROUNDED,
    WITH_AMX,
    Examination,
    Facts,
    Format,
    Loading,
    Reason,
    SchemeRules,
    counted,
    integer_scheme,
    is_packed_integer,
    middle_code,
    one_scheme_problems,
    require,
    require_names,
    some,
)
from .names import NameRules, exactly

_BITS = 4
_LANES = (0, 2, 4, 6, 1, 3, 5, 7)  # the output, among eight, whose code is the first, the second, ... of a word
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # the inverse: where in the word the first, the second, ... output lies
_PER_WORD = 8
_HEAD = "lm_head"
# A key of our own: all zero points are 8. AWQ's own "zero_point" says that zero points are stored, as they always are.
_SYMMETRIC = "symmetric"


class AWQ(Format):
    """Integers of 4 bits, all layers alike."""

    name = "awq"
    rank = 45
    quant_method = "awq"
    tags: ClassVar[tuple[str, ...]] = ("gemm",)
    hf_methods = ("awq",)
    marker = "qweight"
    suffixes = ("qweight", "qzeros", "scales")
    exact_scales = True
    convertible = True
    output_multiple = _PER_WORD

    def problems(self, scheme: Scheme, shape: tuple[int, ...]) -> list[str]:
        if not is_packed_integer(scheme) or scheme.bits != _BITS:
            return [f"{self.name} holds weight-only integers of {_BITS} bits, not {scheme.name}"]
        if shape[0] % _PER_WORD:
            return [f"{self.name} packs {_PER_WORD} outputs into a word, got shape {list(shape)}"]
        return []

    def mixture_problems(self, schemes: Mapping[str, Scheme]) -> list[str]:
        return one_scheme_problems(self, schemes)

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        return torch.float16

    def write(self, qtensor: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
        assert qtensor.order is None, "holds_order says that this format has no place for it"
        codes, zeros = unpack(qtensor.codes, _BITS, qtensor.shape[1]), qtensor.zeros
        if zeros is None:
            zeros = torch.full(qtensor.scales.shape, middle_code(qtensor.scheme), dtype=torch.uint8)
        return {
            "qweight": _pack_outputs(codes),
            "qzeros": _pack_outputs(zeros),
            "scales": qtensor.scales.t().contiguous(),
        }

    def read(self, scheme: Scheme, tensors: dict[str, Tensor]) -> QTensor:
        qweight, qzeros, scales = (tensors[suffix] for suffix in self.suffixes)
        for name, tensor in tensors.items():
            require(tensor.dim() == 2, f"{name} has {tensor.dim()} dimensions, expected 2")
        groups, out_features = scales.shape
        require(out_features % _PER_WORD == 0, f"scales are of {out_features} outputs, no multiple of {_PER_WORD}")
        for name, tensor, rows in (("qweight", qweight, qweight.shape[0]), ("qzeros", qzeros, groups)):
            require(tensor.dtype == torch.int32, f"{name} has dtype {tensor.dtype}, expected torch.int32")
            size = [rows, out_features // _PER_WORD]
            require(list(tensor.shape) == size, f"{name} has shape {list(tensor.shape)}, expected {size}")
        zeros, middle = _unpack_outputs(qzeros), middle_code(scheme)
        if scheme.symmetric:
            same = torch.equal(zeros, torch.full_like(zeros, middle))
            require(same, f"qzeros hold other numbers than {middle}, and the config says {_SYMMETRIC!r}")
        shape, codes = (out_features, qweight.shape[0]), pack(_unpack_outputs(qweight), _BITS)
        return QTensor(scheme, shape, codes, scales.t().contiguous(), None if scheme.symmetric else zeros)

    def quantization_config(
        self, schemes: Mapping[str, Scheme], kept: Sequence[str], dtype: torch.dtype, ordered: bool = False
    ) -> dict[str, Any]:
        """Readers leave alone every layer whose name holds an entry of "modules_to_not_convert" anywhere.

        An entry that a quantized layer's name holds, too, is left out.
        """
        (scheme,) = set(schemes.values())
        head = any(layer.rpartition(".")[2] == _HEAD for layer in schemes)
        names = [name for name in kept if not name.startswith("re:") and not any(name in layer for layer in schemes)]
        config = {
            "quant_method": self.quant_method,
            "version": self.tags[0],
            "bits": scheme.bits,
            "group_size": scheme.group_size or -1,
            "zero_point": True,
            "modules_to_not_convert": list(dict.fromkeys([*names, *([] if head else [_HEAD])])),
        }
        return config | ({_SYMMETRIC: True} if scheme.symmetric else {}) | ({_HEAD: True} if head else {})

    def scheme_rules(self, config: dict[str, Any]) -> SchemeRules:
        version = config.get("version", config.get("format", self.tags[0]))
        require(
            isinstance(version, str) and version.lower() in self.tags,
            f"version {version!r} is not supported, only {self.tags[0]!r}",
        )
        require(config.get("backend") != "llm-awq", "backend 'llm-awq' is not supported: it has a layout of its own")
        bits, size = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size"))
        require(bits == _BITS, f"bits is {bits!r}, expected {_BITS}")
        require(size is not None, "group_size is missing")
        zeros = config.get("zero_point", True)
        require(zeros is True, f"zero_point is {zeros!r}; version {version!r} has zero points")
        symmetric = config.get(_SYMMETRIC, False)
        _left_alone(config)  # refuses what is no list of names
        return NameRules(integer_scheme(bits, None if size == -1 else size, symmetric))

    def kept(self, config: dict[str, Any]) -> list[str]:
        return ["re:.*" + exactly(entry)[1:-1] for entry in _left_alone(config)]

    def diagnose(self, seen: Examination) -> tuple[list[str], list[str]]:
        entries = _left_alone(seen.config)
        faults = []
        if hidden := [layer for layer in seen.layers if any(entry in layer for entry in entries)]:
            faults.append(
                f"{some(hidden)}: quantized, and the config's modules_to_not_convert matches, so runtimes look for a "
                "plain weight there"
            )
        if unlisted := [name for name in seen.unquantized(_HEAD) if not any(entry in name for entry in entries)]:
            faults.append(
                f"{some(unlisted)}: neither quantized nor in the config's modules_to_not_convert, so runtimes look for "
                "packed weights there"
            )
        notes = []
        if seen.scale_dtypes not in ([], ["float16"]):
            notes.append(f"scales are {' and '.join(seen.scale_dtypes)}, where AWQ has float16")
        return faults, notes

    def runtimes(self, facts: Facts) -> dict[str, Loading]:
        head = [layer for layer in facts.schemes if layer.rpartition(".")[2] == _HEAD]
        own: list[Reason] = [("unknown", "whether it reads a quantized head was not tried")] if head else []
        if facts.experts:
            own.append(("unknown", "whether it reads experts in this layout was not tried"))
        odd = [layer for layer, shape in facts.shapes.items() if any(size % 64 for size in shape)]
        served = [*own, *([("unknown", counted("features are no multiples of 64", odd))] if odd else [])]
        return {
            "transformers": Loading(own, needs="gptqmodel"),
            "GPTQModel": Loading(own),
            "vLLM": Loading([*served, *([WITH_AMX] if facts.experts else [])]),
            "SGLang": Loading(served),
            "llama.cpp": Loading([("no", "its converter does not read AWQ")]),
            "MLX": Loading(own),
            "ORT GenAI": Loading([*own, HEAD_IS_ROUNDED]),
            "TensorRT-LLM": Loading([("unknown", "its documents name AWQ, and files like these were not tried")]),
        }

    def fast_kernel(self, scheme: Scheme) -> bool:
        return True

    def input_multiple(self, scheme: Scheme, cut: bool) -> int:
        return scheme.group_size or 1


def _left_alone(config: dict[str, Any]) -> list[str]:
    """The texts of "modules_to_not_convert"."""
    return require_names(config.get("modules_to_not_convert") or [], "modules_to_not_convert")


def _pack_outputs(codes: Tensor) -> Tensor:
    """uint8 codes [out, n] -> int32 words [n, out / 8]."""
    return pack(codes.t().unflatten(-1, (-1, _PER_WORD))[..., list(_LANES)].flatten(-2), _BITS)


def _unpack_outputs(words: Tensor) -> Tensor:
    """The inverse of _pack_outputs."""
    codes = unpack(words.contiguous(), _BITS, words.shape[1] * _PER_WORD)
    return codes.unflatten(-1, (-1, _PER_WORD))[..., list(_PLACES)].flatten(-2).t().contiguous()


PLUGINS = (AWQ(),)
