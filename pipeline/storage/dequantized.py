"""A checkpoint with coded weights as everyone else sees it: plain tensors, dequantized a few rows at a time."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitpress.kernels.discovery import discover

from ..errors import CheckpointError, listing
from . import sources
from .finite import count_not_finite
from .sources.base import FLOAT8, ReadRows, Source
from .tensor_info import TensorInfo

_PIECE = 1 << 20  # values that are dequantized together: 4 MiB of them stay in the caches
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SECTION = "quantization_config"


class DequantizedTensors:
    """The tensors of a coded checkpoint.

    Attributes:
        tensors: name -> TensorInfo, in file order. A coded weight is there as `rows` gives it, its scales are not.
        dtype: what coded weights are read as.
        sentence: how the weights lie in the files, and what they are read as.
    """

    def __init__(
        self,
        folder: Path,
        source: Source,
        section: Mapping[str, Any],
        stored: Mapping[str, TensorInfo],
        dtype: torch.dtype,
    ):
        """Find the weights and their scales in headers.

        Raises:
            CheckpointError: tensors that do not fit together, all of them.
        """
        coding = source.coding(section, stored)
        self._weights, self.dtype = coding.weights, dtype
        dense, scales = {}, set(coding.other_scales)
        for name, weight in coding.weights.items():
            codes = weight.codes
            scales |= {part.name for part in weight.parts[1:]}
            nbytes = math.prod(weight.shape) * dtype.itemsize
            dense[codes.name] = TensorInfo(name, codes.file, dtype, weight.dense_shape, codes.offset, nbytes)
            if name in stored and name != codes.name:
                coding.problems.append(f"{name} is there twice: as it is, and as {codes.name}")
        infos = (dense.get(name, info) for name, info in stored.items() if name not in scales)
        self.tensors = {info.name: info for info in infos}
        coding.problems += [
            f"{name} is {str(info.dtype).removeprefix('torch.')}, and nothing says what scales it"
            for name, info in self.tensors.items()
            if info.dtype in FLOAT8 and not coding.problems
        ]
        if coding.problems:
            raise CheckpointError(
                f"{folder}: its weights cannot be dequantized ({source.name}):\n{listing(coding.problems)}"
            )
        self.sentence = f"config.json says {source.name}, and no weight in the files is coded so"
        if coding.weights:
            self.sentence = (
                f"{len(coding.weights)} weights lie in the files as {source.name}; they are dequantized one at a time "
                f"to {str(dtype).removeprefix('torch.')}, and inputs are left as they are"
            )
        if coding.other_scales:
            self.sentence += f"; {len(coding.other_scales)} scales of inputs and caches are left out"

    def __contains__(self, name: str) -> bool:
        """Whether a tensor of `tensors` has to be dequantized."""
        return name in self._weights

    def stored_bytes(self, name: str) -> int:
        """What a coded weight takes in the files."""
        return sum(part.nbytes for part in self._weights[name].parts)

    def rows(self, name: str, start: int, stop: int, read: ReadRows) -> Tensor:
        """Rows of a coded weight, [stop - start, ..] of `dtype`.

        Raises:
            CheckpointError: codes or scales that stand for no number, or values that the dtype cannot hold.
        """
        info, weight = self.tensors[name], self._weights[name]
        try:
            result = torch.empty((stop - start, *info.shape[1:]), dtype=self.dtype)
        except RuntimeError as error:
            raise CheckpointError(f"{name}: {info.nbytes / 1e9:.0f} GB do not fit into memory") from error
        step = max(1, _PIECE // math.prod(info.shape[1:]))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            piece = result[first - start : last - start]
            try:
                piece.copy_(weight.rows(first, last, read).to(self.dtype))  # transposed ones are faster so
            except ValueError as error:
                raise CheckpointError(f"{info.file}: {name}: {error}; get the checkpoint again") from error
            if bad := count_not_finite(piece):
                raise CheckpointError(
                    f"{info.file}: {name}: {bad} of its values are too large for {self.dtype}, the dtype in "
                    "config.json; set it to bfloat16"
                )
        return result


def dequantized(
    folder: Path,
    config: Mapping[str, Any],
    stored: Mapping[str, TensorInfo],
    read_json: Callable[[Path], dict[str, Any]],
) -> DequantizedTensors | None:
    """The tensors of a checkpoint whose weights are coded; None where they lie in the files as they are.

    They are read as what config.json says that the model computes with, or as bfloat16 where it does not say.

    Args:
        config: config.json, untrusted. stored: all tensors of the files.
        read_json: reads another file that may describe the coding.
    Raises:
        CheckpointError: tensors that do not fit together, or float8 tensors whose coding nothing describes.
    """
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    named = [str(part.get(key)) for part in parts for key in ("dtype", "torch_dtype")]
    dtype = next((_DTYPES[name] for name in named if name in _DTYPES), torch.bfloat16)
    for source in discover(sources.__name__):
        others = {name: read_json(folder / name) for name in source.side_files if (folder / name).exists()}
        for part in parts:
            if (section := source.section(part, others)) is not None:
                return DequantizedTensors(folder, source, section, stored, dtype)
    float8 = [name for name, info in stored.items() if info.dtype in FLOAT8]
    if float8 and not any(part.get(_SECTION) for part in parts):
        raise CheckpointError(
            f"{folder / 'config.json'} has no {_SECTION}, and tensors such as {float8[0]} are float8: what scales them "
            "cannot be told; add it as the model's publisher has it"
        )
    return None


def without_coding(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of the same model with its weights dequantized to a dtype, which takes the place of float8."""
    name = str(dtype).removeprefix("torch.")
    plain = {key: value for key, value in config.items() if key != _SECTION}
    plain |= {key: name for key in ("dtype", "torch_dtype") if str(plain.get(key)).startswith("float8")}
    if isinstance(text := plain.get("text_config"), dict):
        plain["text_config"] = without_coding(text, dtype)
    return plain


def coding_files() -> Iterator[str]:
    """Names of files that describe codings, beside config.json; no artifact gets a copy of them."""
    for source in discover(sources.__name__):
        yield from source.side_files
