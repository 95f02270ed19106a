"""A GGUF file as everyone else sees a checkpoint: the tensors by transformers' names, rows in transformers' order."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import CheckpointError
from ..sources.base import ReadRows
from ..tensor_info import TensorInfo
from .architectures import FACTOR, Architecture, Place, architecture_of, permute_back
from .file import BlockType, GGUFFile
from .template import PLACES, Places

_MOST_EXPERTS = 4096
BLOCKS = "blocks"  # X.blocks: the blocks of layer X, uint8 [out, blocks, bytes of a block]
DIVISOR = "global_scale"  # X.global_scale, float32 [1]: what divides the scales of layer X
DIVISORS = "bitpress.global_scales"  # in the metadata: all of them, in the order of the tensors in the file
_INPUT_FACTOR = ".input_scale"  # what inputs are multiplied by before kernels for GPUs round them


class GGUFTensors:
    """The tensors of a GGUF file, in whose folder lies the config.json.

    Where that has a quantization_config, bitpress wrote the file, and blocks are there as they lie in it. Else another
    program did, and they are dequantized as they are read.

    Attributes:
        tensors: name -> TensorInfo, in file order; blocks that are not dequantized as X.blocks.
        dtype: None; the config's own dtype is that of the tensors.
        sentence: what is dequantized; None where nothing is.
    """

    dtype = None

    def __init__(self, file: GGUFFile, config: Mapping[str, Any]):
        """Name the tensors.

        Raises:
            CheckpointError: the config is of an architecture that is not known as GGUF, or of another than the file.
        """
        self._places: dict[str, Place] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._kinds: dict[str, BlockType] = {}  # of tensors that are dequantized
        self._factors: dict[str, TensorInfo] = {}  # what a tensor that is dequantized is multiplied by, float32 [1]
        self._divisors: dict[str, float] = {}
        self._dense = None if config.get("quantization_config") else _dtype(config)
        self.tensors: dict[str, TensorInfo] = {}
        stated, places = file.metadata.get("general.architecture"), file.metadata.get(PLACES)
        self._architecture: Architecture | Places
        try:
            if places is None:
                self._architecture = architecture_of(config)
            else:
                rows = {tensor.name: tensor.shape[0] for tensor in file.tensors.values()}
                self._architecture = Places.of_json(str(stated), places, rows)
        except ValueError as error:
            raise CheckpointError(f"{file.path}: {error}") from error
        own = self._architecture.name
        if stated != own:
            raise CheckpointError(f"{file.path} is of the architecture {stated!r}, and config.json means {own}")
        stored = file.stored()
        coded = {name for name in stored if file.tensors[name].kind.dtype is None}
        factors = {
            name: info
            for name, info in stored.items()
            if name.endswith(FACTOR) and f"{name.removesuffix(FACTOR)}.weight" in coded
        }
        unused = {n for n in stored if n.endswith(_INPUT_FACTOR) and f"{n.removesuffix(_INPUT_FACTOR)}.weight" in coded}
        for name, info in stored.items():
            if self._architecture.holds(name) and name not in factors and name not in unused:
                self._add(info, self._architecture, config, file.tensors[name].kind)
        self._add_factors(factors, file)
        self.sentence = None
        if self._kinds:
            kinds = ", ".join(sorted({kind.name for kind in self._kinds.values()}))
            self.sentence = (
                f"{len(self._kinds)} weights lie in {file.path.name} as {kinds}; they are dequantized one at a time to "
                f"{str(self._dense).removeprefix('torch.')}"
            )

    def _add(
        self, info: TensorInfo, architecture: Architecture | Places, config: Mapping[str, Any], kind: BlockType
    ) -> None:
        coded = kind.dtype is None
        whole = "_exps." not in info.name
        if not whole and info.shape[0] > _MOST_EXPERTS:
            raise CheckpointError(f"{info.file}: {info.name} has {info.shape[0]} experts, at most {_MOST_EXPERTS}")
        names = architecture.names(info.name, 1 if whole else info.shape[0]) or [info.name]
        whole = whole or names == [info.name]  # nothing of the model
        for number, name in enumerate(names):
            shown = f"{name.removesuffix('.weight')}.{BLOCKS}" if coded and self._dense is None else name
            place = architecture.place(name, config) or Place(info.name)
            shape = info.shape if whole else info.shape[1:]
            if place.flat:
                shape = (1, *shape)
            nbytes = info.nbytes if whole else info.nbytes // info.shape[0]
            offset = info.offset + (0 if whole else number * nbytes)
            self.tensors[shown] = self._infos[shown] = TensorInfo(shown, info.file, info.dtype, shape, offset, nbytes)
            if coded and self._dense is not None:
                dense = (*shape[:-2], shape[-2] * kind.values)
                size = math.prod(dense) * self._dense.itemsize
                self.tensors[shown] = TensorInfo(shown, info.file, self._dense, dense, offset, size)
                self._kinds[shown] = kind
            if place.heads or place.shift:
                self._places[shown] = place

    def _add_factors(self, factors: Mapping[str, TensorInfo], file: GGUFFile) -> None:
        """What weights are multiplied by: as divisors of their scales where bitpress wrote the file."""
        stated = file.metadata.get(DIVISORS)
        numbers = sum(math.prod(info.shape) for info in factors.values())
        if self._dense is None and factors and not _is_floats(stated, numbers):
            raise CheckpointError(
                f"{file.path}: {DIVISORS} is {stated!r:.40}, expected {numbers} numbers; get the file again"
            )
        divisors: list[float] = stated if self._dense is None and stated else []
        place = 0
        for name, info in factors.items():
            weight = f"{name.removesuffix(FACTOR)}.weight"
            count = math.prod(info.shape)
            names = (self._architecture.names(weight, count) if count <= _MOST_EXPERTS else None) or []
            if info.dtype != torch.float32 or len(info.shape) != 1 or len(names) != count:
                raise CheckpointError(
                    f"{file.path}: {name} has shape {list(info.shape)} and dtype {info.dtype}, expected a float32 "
                    "number for each weight; get the file again"
                )
            for number, own in enumerate(names):
                layer = own.removesuffix(".weight")
                shown = f"{layer}.{DIVISOR}"
                one = TensorInfo(shown, info.file, info.dtype, (1,), info.offset + 4 * number, 4)
                if self._dense is not None:
                    self._factors[own] = one
                else:
                    self.tensors[shown] = self._infos[shown] = one
                    self._divisors[shown] = divisors[place + number]
            place += count

    def __contains__(self, name: str) -> bool:
        """Whether a tensor does not lie in the file as it is shown."""
        return name in self._places or name in self._kinds or name in self._divisors

    def stored_bytes(self, name: str) -> int:
        return self._infos[name].nbytes

    def rows(self, name: str, start: int, stop: int, read: ReadRows) -> Tensor:
        """Rows of a tensor that is dequantized, whose rows lie in another order, or whose values lie shifted.

        Raises:
            CheckpointError: its rows are no whole heads, or the package that dequantizes it is missing.
        """
        info, place, kind = self._infos[name], self._places.get(name), self._kinds.get(name)
        if (stated := self._divisors.get(name)) is not None:
            divisor = torch.tensor([stated])
            if not torch.equal(divisor.reciprocal(), read(info, 0, 1)):
                raise CheckpointError(f"{info.file}: {DIVISORS} and the factor of {name} differ; get the file again")
            return divisor[start:stop]
        if place is None:
            assert kind is not None
            return self._dequantized(name, read(info, start, stop), kind, read)
        tensor = read(info, 0, info.shape[0])
        if kind is not None:
            tensor = self._dequantized(name, tensor, kind, read)
        if place.heads:
            if not isinstance(place.heads, int) or place.heads < 1 or info.shape[0] % (2 * place.heads):
                raise CheckpointError(f"{name}: {info.shape[0]} rows are no {place.heads} heads of an even size")
            tensor = permute_back(tensor, place.heads)
        if place.shift:
            tensor = tensor.to(torch.float32) - place.shift
        return tensor[start:stop].contiguous()

    def _dequantized(self, name: str, blocks: Tensor, kind: BlockType, read: ReadRows) -> Tensor:
        """Blocks [.., blocks, bytes] as numbers [.., in] of the config's dtype."""
        try:
            import gguf
        except ImportError as error:
            raise CheckpointError(
                f"{self._infos[name].file} is dequantized by the package gguf, which is not installed; pip install gguf"
            ) from error
        flat = blocks.flatten(-2).reshape(-1, blocks.shape[-2] * blocks.shape[-1])
        with np.errstate(all="ignore"):  # a scale that is not finite shows in the weights, which are checked
            values = gguf.quants.dequantize(flat.numpy(), gguf.GGMLQuantizationType(kind.id))
        dense = torch.from_numpy(values).reshape(*blocks.shape[:-2], -1)
        if (factor := self._factors.get(name)) is not None:
            dense = dense * read(factor, 0, 1)
        return dense.to(self._dense)


def _is_floats(value: Any, count: int) -> bool:
    """Whether a value of the metadata is a list of so many finite numbers that are not 0."""
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(each, float) and math.isfinite(each) and each for each in value)
    )


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    """What a config.json says that the model computes with; bfloat16 where it does not say."""
    named = str(config.get("dtype", config.get("torch_dtype")))
    return {"float32": torch.float32, "float16": torch.float16}.get(named, torch.bfloat16)
