"""A GGUF file as everyone else sees a checkpoint: the tensors by transformers' names, rows in transformers' order."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ..sources.base import ReadRows
from ..tensor_info import TensorInfo
from .architectures import Architecture, Place, architecture_of, is_generated, permute_back
from .file import GGUFFile

_MOST_EXPERTS = 4096
BLOCKS = "blocks"  # X.blocks: the blocks of layer X, uint8 [out, blocks, bytes of a block]


class GGUFTensors:
    """The tensors of a GGUF file that bitpress wrote, in whose folder lies the config.json.

    Attributes:
        tensors: name -> TensorInfo, in file order. Blocks are there as they lie in the file, as X.blocks.
        dtype, sentence: None; nothing is dequantized.
    """

    dtype = None
    sentence = None

    def __init__(self, file: GGUFFile, config: Mapping[str, Any]):
        """Name the tensors.

        Raises:
            CheckpointError: the config is of an architecture that is not known as GGUF, or of another than the file.
        """
        self._places: dict[str, Place] = {}
        self._infos: dict[str, TensorInfo] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            self._architecture = architecture_of(config)
        except ValueError as error:
            raise CheckpointError(f"{file.path}: {error}") from error
        own, stated = self._architecture.name, file.metadata.get("general.architecture")
        if stated != own:
            raise CheckpointError(f"{file.path} is of the architecture {stated!r}, and config.json means {own}")
        for name, info in file.stored().items():
            if not is_generated(name):
                self._add(info, self._architecture, config, file.tensors[name].kind.dtype is None)

    def _add(self, info: TensorInfo, architecture: Architecture, config: Mapping[str, Any], coded: bool) -> None:
        whole = "_exps." not in info.name
        if not whole and info.shape[0] > _MOST_EXPERTS:
            raise CheckpointError(f"{info.file}: {info.name} has {info.shape[0]} experts, at most {_MOST_EXPERTS}")
        names = architecture.names(info.name, 1 if whole else info.shape[0]) or [info.name]
        whole = whole or names == [info.name]  # nothing of the model
        for number, name in enumerate(names):
            shown = f"{name.removesuffix('.weight')}.{BLOCKS}" if coded else name
            place = architecture.place(name, config) or Place(info.name)
            shape = info.shape if whole else info.shape[1:]
            if place.flat:
                shape = (1, *shape)
            nbytes = info.nbytes if whole else info.nbytes // info.shape[0]
            offset = info.offset + (0 if whole else number * nbytes)
            self.tensors[shown] = self._infos[shown] = TensorInfo(shown, info.file, info.dtype, shape, offset, nbytes)
            if place.heads or place.shift:
                self._places[shown] = place

    def __contains__(self, name: str) -> bool:
        """Whether a tensor does not lie in the file as it is shown."""
        return name in self._places

    def stored_bytes(self, name: str) -> int:
        return self._infos[name].nbytes

    def rows(self, name: str, start: int, stop: int, read: ReadRows) -> Tensor:
        """Rows of a tensor whose rows lie in another order, or whose values lie shifted.

        Raises:
            CheckpointError: its rows are no whole heads.
        """
        info, place = self._infos[name], self._places[name]
        tensor = read(info, 0, info.shape[0])
        if place.heads:
            if not isinstance(place.heads, int) or place.heads < 1 or info.shape[0] % (2 * place.heads):
                raise CheckpointError(f"{name}: {info.shape[0]} rows are no {place.heads} heads of an even size")
            tensor = permute_back(tensor, place.heads)
        if place.shift:
            tensor = tensor.to(torch.float32) - place.shift
        return tensor[start:stop].contiguous()
