"""MXFP4 as gpt-oss is published: the experts of a block in one tensor of codes, one of scales and one of biases.

`X.gate_up_proj_blocks` uint8 [experts, 2 x inner, in / 32, 16] holds two E2M1 codes a byte, the even input in the low
half; `_scales` uint8 [experts, 2 x inner, in / 32] the E8M0 scales; `_bias` [experts, 2 x inner]. Rows of gate and up
alternate. `X.down_proj_…` is alike, with one layer for each expert. Here each expert's layers are seen by themselves,
as X.3.gate_proj.blocks, and are put together as they are written.

Sources: gpt_oss/torch/weights.py of OpenAI; Mxfp4Config and integrations/mxfp4.py of transformers.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme
from bitpress.kernels.weights.base import WeightDescription

from ..storage.checkpoint import Checkpoint, CheckpointView
from ..storage.tensor_info import TensorInfo
from .base import Examination, Facts, Format, Loading, SafetensorsWriter, SchemeRules, Shard, require, some
from .names import NameRules

_GROUP = 32
_BYTES = _GROUP // 2  # of the codes of a group
_CODES, _SCALES, _BIAS = "blocks", "scales", "bias"
_PIECES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_WHOLE_OF = {piece: whole for whole, pieces in _PIECES.items() for piece in pieces}
_WHOLE = re.compile(rf"(.+\.experts)\.({'|'.join(_PIECES)})_({_CODES}|{_SCALES}|{_BIAS})")
_ONE = re.compile(rf"(.+\.experts)\.(\d+)\.({'|'.join(_WHOLE_OF)})\.({_CODES}|{_SCALES}|{_BIAS})")
_MODEL = "gpt_oss"


class MXFP4Experts(Format):
    """The experts of gpt-oss, and nothing else."""

    name = "mxfp4"
    rank = 80
    quant_method = "mxfp4"
    tags: ClassVar[tuple[str, ...]] = ()
    marker = _SCALES
    suffixes = (_CODES, _SCALES)
    joins_experts = True
    convertible = True

    def problems(self, scheme: Scheme, shape: tuple[int, ...]) -> list[str]:
        own = scheme == _scheme()
        return [] if own else [f"{self.name} holds the experts of gpt-oss as {_scheme().name}, not {scheme.name}"]

    def checkpoint_problems(self, checkpoint: Checkpoint, layers: Iterable[str]) -> list[str]:
        if (kind := checkpoint.config.get("model_type")) != _MODEL:
            return [f"{self.name} holds the experts of gpt-oss, and this is the model type {kind!r}"]
        layers = list(layers)
        if others := [layer for layer in layers if not _ONE.fullmatch(f"{layer}.{_CODES}")]:
            return [
                f"{self.name} holds experts alone, and {some(others)} would be quantized, too; leave them out: "
                "scheme none, and a rule for '*.experts.*'"
            ]
        return []

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        return torch.uint8

    def write(self, qtensor: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
        codes = qtensor.codes.unflatten(1, (-1, _BYTES))
        return {_CODES: codes.contiguous(), _SCALES: qtensor.scales.contiguous()}

    def read(self, scheme: Scheme, tensors: dict[str, Tensor]) -> QTensor:
        codes, scales = tensors[_CODES], tensors[_SCALES]
        require(
            codes.dim() == 3 and codes.shape[2] == _BYTES,
            f"{_CODES} has shape {list(codes.shape)}, expected [out, in / {_GROUP}, {_BYTES}]",
        )
        return QTensor(scheme, (codes.shape[0], codes.shape[1] * _GROUP), codes.flatten(1), scales)

    def quantization_config(
        self, schemes: Mapping[str, Scheme], kept: Sequence[str], dtype: torch.dtype, ordered: bool = False
    ) -> dict[str, Any]:
        return {"quant_method": self.quant_method, "modules_to_not_convert": [n for n in kept if n[:3] != "re:"]}

    def scheme_rules(self, config: dict[str, Any]) -> SchemeRules:
        return NameRules(_scheme())

    def unsupported(self, config: dict[str, Any], tensors: Mapping[str, TensorInfo]) -> str | None:
        wholes = {match[1] + "." + match[2] for name in tensors if (match := _WHOLE.fullmatch(name))}
        for whole in sorted(wholes):
            codes, scales, bias = (tensors.get(f"{whole}_{part}") for part in (_CODES, _SCALES, _BIAS))
            if codes is None and scales is None:
                continue  # experts that are not quantized
            if codes is None or scales is None:
                return f"{whole} has no codes or no scales"
            shape = codes.shape
            if len(shape) != 4 or shape[3] != _BYTES or 0 in shape or shape[1] % len(_PIECES[whole.rpartition(".")[2]]):
                return f"{codes.name} has shape {list(shape)}"
            if scales.shape != shape[:3] or (bias is not None and bias.shape != shape[:2]):
                return f"the scales or biases of {whole} are of another shape than its codes"
            if {codes.dtype, scales.dtype} != {torch.uint8}:
                return f"{whole} is not of bytes"
        single = any(_ONE.fullmatch(name) for name in tensors)
        return None if wholes or single else "no tensor is called as gpt-oss's experts are"

    def view(self, checkpoint: Checkpoint) -> Checkpoint:
        return _SingleExperts(checkpoint)

    def together(self, name: str) -> str:
        """The experts of a block lie in one tensor."""
        return name.partition(".experts.")[0] if ".experts." in name else name

    def kept(self, config: dict[str, Any]) -> list[str]:
        entries = config.get("modules_to_not_convert")
        return [each for each in entries if isinstance(each, str)] if isinstance(entries, list) else []

    def diagnose(self, seen: Examination) -> tuple[list[str], list[str]]:
        return [], []

    def runtimes(self, facts: Facts) -> dict[str, Loading]:
        refused = "it does not read gpt-oss's own layout"
        return {
            "transformers": Loading([("yes", "on GPUs in MXFP4; elsewhere its weights become bfloat16")], "kernels"),
            "vLLM": Loading([("yes", "its gpt-oss reads this layout, on GPUs")]),
            "SGLang": Loading([("yes", "by its documents, on GPUs; it was not tried")]),
            "llama.cpp": Loading([("yes", "its converter moves the codes as they are")]),
            "MLX": Loading([("unknown", "mlx-lm converts gpt-oss from this layout by its sources; it was not tried")]),
            "ORT GenAI": Loading([("unknown", "its builder knows gpt-oss; files like these were not tried")]),
            "GPTQModel": Loading([("no", refused)]),
            "TensorRT-LLM": Loading([("unknown", "its documents name gpt-oss; files like these were not tried")]),
        }

    def writer(self, folder: Path, dtype: torch.dtype, shards: int) -> "_ExpertsWriter":
        return _ExpertsWriter(self, folder, dtype, shards)


def _scheme() -> Scheme:
    return Scheme.from_description(WeightDescription("float", 4, "group", _GROUP))


class _SingleExperts(CheckpointView):
    """A checkpoint whose tensors of all experts are seen as tensors of each layer of each expert."""

    def __init__(self, checkpoint: Checkpoint):
        super().__init__(checkpoint)
        self._places: dict[str, tuple[TensorInfo, int, int, int]] = {}  # name -> tensor, expert, piece, pieces
        coded = {name.removesuffix(f"_{_CODES}") for name in checkpoint.tensors if name.endswith(f"_{_CODES}")}
        infos: list[TensorInfo] = []
        for info in checkpoint.tensors.values():
            match = _WHOLE.fullmatch(info.name)
            if match is None or f"{match[1]}.{match[2]}" not in coded or len(info.shape) < 2:
                infos.append(info)
                continue
            pieces, (experts, rows, *rest) = _PIECES[match[2]], info.shape
            shape, size = (rows // len(pieces), *rest), info.nbytes // (experts * len(pieces))
            for expert in range(experts):
                for number, piece in enumerate(pieces):
                    name = f"{match[1]}.{expert}.{piece}.{match[3]}"
                    self._places[name] = (info, expert, number, len(pieces))
                    infos.append(replace(info, name=name, shape=shape, nbytes=size))
        self.tensors = {info.name: info for info in infos}

    def part(self, name: str) -> Tensor | None:
        if name not in self._places:
            return None
        info, expert, number, pieces = self._places[name]
        (rows,) = self.whole.read_rows(info.name, [1], first=expert)
        return rows[0, number::pieces].contiguous()


class _ExpertsWriter(SafetensorsWriter):
    """Puts the layers of single experts together; all experts of a block must be added between two cuts."""

    def cut(self, number: int) -> Shard:
        parts: dict[tuple[str, str, str], dict[tuple[int, int], Tensor]] = {}
        for name in list(self.pending):
            if match := _ONE.fullmatch(name):
                whole = _WHOLE_OF[match[3]]
                place = int(match[2]), _PIECES[whole].index(match[3])
                parts.setdefault((match[1], whole, match[4]), {})[place] = self.pending.pop(name)
        for (module, whole, part), tensors in parts.items():
            pieces = len(_PIECES[whole])
            experts = 1 + max(expert for expert, _ in tensors)
            assert len(tensors) == experts * pieces, f"some experts of {module} were not added"
            rows = [
                torch.stack([tensors[expert, piece] for piece in range(pieces)], 1).flatten(0, 1)
                for expert in range(experts)
            ]
            self.pending[f"{module}.{whole}_{part}"] = torch.stack(rows)
        return super().cut(number)


PLUGINS = (MXFP4Experts(),)
