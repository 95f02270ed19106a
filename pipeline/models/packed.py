"""Packed weights beside a checkpoint: all that loading makes of its files, kept to be mapped the next time.

`bitpress optimize` loads a checkpoint once and writes what its layers on the CPU hold by then, in their kernels' own
layout, and every tensor that is not quantized. To load maps that file: nothing is read, checked or packed any more, and
processes share its pages. Where the system maps no huge pages of files (Linux before 6.16 on ext4, say), packed weights
are copied out of the file, as decoding would be a seventh slower otherwise. Quantized layers whose kernel keeps no
packed weights are read from the checkpoint as before.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitpress.kernels.cpu.native import copied, mapped_in_huge_pages, page_in
from bitpress.kernels.linear import QLinear
from bitpress.kernels.qtensor import QTensor, check_permutation
from bitpress.kernels.registry import Selection, select
from bitpress.kernels.scheme import Scheme

from ..errors import CheckpointError
from ..storage.checkpoint import Checkpoint
from ..storage.fingerprint import MANIFEST
from ..storage.packed_file import PackedFile, PackedFileError, packed_files, write_packed
from ..system.remembered import programs
from ..system.versions import versions
from .modules import MakeLayer, set_tensor
from .quantized import QuantizedCheckpoint
from .structure import ParameterPath, tied

CPU = torch.device("cpu")
_log = logging.getLogger(__name__)
_VERSION = 1  # of what is kept, and by which names
_PLAIN, _ORDER = "plain ", "order"  # no layer's name has a space


@dataclass(frozen=True)
class PackedWeights:
    """What a file of packed weights gives to a model.

    Attributes:
        layers: layer -> makes its module. plain: parameter or buffer -> its tensor, of those that are not quantized.
        trials: what trials of decoder layers showed, if it still holds; see optimize.Trials.
    """

    layers: Mapping[str, MakeLayer]
    plain: Mapping[str, Tensor]
    trials: Mapping[str, str | None]

    def fill(self, model: PreTrainedModel) -> None:
        """Put what is not quantized into the model's skeleton."""
        for name, tensor in self.plain.items():
            set_tensor(model, ParameterPath(name), tensor, CPU)


def packed_name(contents: QuantizedCheckpoint, kernel: str) -> str | None:
    """What the file of packed weights is called: for this dtype, and the layouts of these kernels on this machine.

    None where no kernel keeps packed weights.
    """
    forms = {selection.kernel.packed_form() for selection in selections(contents, kernel).values()} - {None}
    words = json.dumps([_VERSION, str(contents.model.dtype), sorted(map(str, forms))])
    return f"{hashlib.sha256(words.encode()).hexdigest()[:16]}.packed" if forms else None


def selections(contents: QuantizedCheckpoint, kernel: str) -> dict[tuple[Scheme, tuple[int, int]], Selection]:
    """Which kernel serves a scheme and a shape; those that none serves are left out, to be told of as ever."""
    chosen = {}
    for layer, shape in contents.shapes.items():
        kind = (contents.schemes[layer], _matrix(shape))
        if kind not in chosen and contents.kinds[layer] != "embedding":
            with contextlib.suppress(ValueError):
                chosen[kind] = select(QTensor.without_content(*kind), contents.model.dtype, CPU, kernel)
    return chosen


def _matrix(shape: tuple[int, ...] | None) -> tuple[int, int]:
    out_features, in_features = shape or (0, 0)
    return out_features, in_features


def key(checkpoint: Checkpoint, contents: QuantizedCheckpoint) -> dict[str, Any]:
    """All that packed weights depend on besides their layout, in plain values.

    Files are told by their sizes and times: to hash them would read them all, which is what takes the time of loading.
    The manifest has the hashes of an artifact's files.
    """
    manifest = checkpoint.folder / MANIFEST
    headers = [[info.name, str(info.dtype), info.shape, info.offset] for info in checkpoint.stored.values()]
    schemes = {layer: scheme.name for layer, scheme in contents.schemes.items()}
    described = {"headers": headers, "schemes": schemes, "config": checkpoint.config}
    return {
        "files": {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in checkpoint.files},
        "manifest": hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None,
        "content": hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest(),
        "transformers": versions().get("transformers"),
    }


class Coming:
    """The packed weights that lie beside a checkpoint, and the only file of them on its way into memory already."""

    def __init__(self, folder: Path):
        self.paths = packed_files(folder)
        self._opened: dict[Path, Opened] = {}
        self.used: Opened | None = None
        if len(self.paths) == 1:
            with contextlib.suppress(PackedFileError):  # it is told of when the file is wanted
                self.open(self.paths[0])

    def open(self, path: Path) -> "Opened":
        """A file that another thread brings into memory.

        Raises:
            PackedFileError: as PackedFile does.
        """
        if path not in self._opened:
            file, executor = PackedFile(path), ThreadPoolExecutor(1)
            huge = mapped_in_huge_pages(file.whole())
            self._opened[path] = Opened(file, executor.submit(page_in, file.whole()), huge)
            executor.shutdown(wait=False)
        return self._opened[path]

    def wait(self) -> None:
        """Return when all of the file that is used is in memory.

        Raises:
            CheckpointError: it cannot be read.
        """
        if self.used and not self.used.ready.result():
            raise CheckpointError(f"{self.used.file.path} cannot be read to its end; delete it, and load again")


@dataclass(frozen=True)
class Opened:
    """A file of packed weights on its way into memory.

    Attributes:
        ready: whether all of it can be read, once that is done. huge: whether it lies in huge pages there.
    """

    file: PackedFile
    ready: Future[bool]
    huge: bool


def open_packed(
    coming: Coming, checkpoint: Checkpoint, contents: QuantizedCheckpoint, kernel: str
) -> PackedWeights | None:
    """The packed weights of a checkpoint, if it has those that fit; a warning says why others are not used."""
    files, name = coming.paths, None
    if files:
        name = packed_name(contents, kernel)
    if name is None:
        return None
    fitting = [path for path in files if path.name == name]
    why = "it was written for another dtype, kernel or machine"
    for path in fitting:
        try:
            return _open(coming, path, checkpoint, contents, kernel)
        except PackedFileError as error:
            why = str(error)
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # a header that bitpress did not write
            why = f"its header makes no sense: {error}"
    _log.warning(
        "packed weights are not used: %s: %s; write them again by `bitpress optimize %s`",
        (fitting or files)[-1], why, checkpoint.folder,
    )  # fmt: skip
    return None


def _open(
    coming: Coming, path: Path, checkpoint: Checkpoint, contents: QuantizedCheckpoint, kernel: str
) -> PackedWeights:
    """Raises PackedFileError: what does not fit, or is not safe to use. ValueError and others: a header of no sense."""
    opened = coming.open(path)
    file = opened.file
    if file.header.get("key") != key(checkpoint, contents):
        raise PackedFileError("the checkpoint, or transformers, changed since it was written")
    plain = {name: file.tensor(f"{_PLAIN}{name}") for name in file.names(_PLAIN)}
    _check_plain(plain, contents)
    chosen = selections(contents, kernel)
    layers = {layer: _restored(opened, layer, contents, chosen) for layer in file.header["layers"]}
    trials = dict(file.header["trials"])
    if any(why is not None and not isinstance(why, str) for why in trials.values()):
        raise PackedFileError("its trials are none")
    if file.header.get("programs") != programs():
        trials = {}
    coming.used = opened
    return PackedWeights(layers, plain, trials)


def _state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameter or buffer -> its tensor; buffers that a state_dict leaves out are among them."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _check_plain(plain: Mapping[str, Tensor], contents: QuantizedCheckpoint) -> None:
    """Raises PackedFileError unless these are what the model has besides quantized layers, in its shapes and dtypes."""
    model, state = contents.model, _state(contents.model)
    for name, tensor in plain.items():
        if name not in state or (state[name].shape, state[name].dtype) != (tensor.shape, tensor.dtype):
            raise PackedFileError(f"{name} does not fit the model")
    elsewhere = {target.parameter for target in contents.quantized.values()} | tied(model).keys()
    elsewhere |= {target.parameter for targets in contents.shared.values() for target in targets}
    if missing := {name for name, _ in model.named_parameters()} - elsewhere - plain.keys():
        raise PackedFileError(f"{min(missing)} is missing")


def _restored(
    opened: Opened,
    layer: str,
    contents: QuantizedCheckpoint,
    chosen: Mapping[tuple[Scheme, tuple[int, int]], Selection],
) -> MakeLayer:
    """Makes a quantized layer of the tensors of the file; its kernel, and the order of its inputs, are checked now.

    Raises:
        PackedFileError, ValueError: they are not safe to multiply by.
    """
    file = opened.file
    form, names = file.header["layers"][layer]
    if layer not in contents.quantized or layer in contents.shared or contents.kinds[layer] == "embedding":
        raise PackedFileError(f"{layer} is no layer of its own")
    scheme, shape, dtype = contents.schemes[layer], _matrix(contents.shapes[layer]), contents.model.dtype
    selection = chosen.get((scheme, shape))
    if selection is None or selection.kernel.packed_form() != form:
        raise PackedFileError(f"{layer} was packed for another kernel")
    tensors = {name: file.tensor(f"{layer}/{name}") for name in names}
    order = tensors.pop(_ORDER, None)
    if order is not None:
        order = order.clone()  # kernels read memory by it: nobody changes it after it was checked
        if (order.dtype, order.shape) != (torch.int32, shape[1:]) or not scheme.weight.holds_order:
            raise PackedFileError(f"{layer}: its order of inputs is {order.dtype} {list(order.shape)}")
        check_permutation(order)
    if not opened.huge:
        bytes_alone = [name for name, tensor in tensors.items() if (tensor.dtype, tensor.dim()) == (torch.uint8, 1)]
        tensors |= {name: copied(tensors[name]) for name in bytes_alone}
    try:
        packed = selection.kernel.restore(QTensor.without_content(scheme, shape), tensors)
    except ValueError as error:
        raise PackedFileError(f"{layer}: {error}") from error
    return lambda bias: QLinear.restored(selection, packed, order, bias, dtype, CPU)


@dataclass(frozen=True)
class Packing:
    """What `bitpress optimize` wrote.

    Attributes:
        path: the file. nbytes: its bytes. layers: how many quantized layers are in it.
        left: layer -> why it is read from the checkpoint as before.
    """

    path: Path
    nbytes: int
    layers: int
    left: dict[str, str]


def write(
    path: Path,
    checkpoint: Checkpoint,
    contents: QuantizedCheckpoint,
    model: PreTrainedModel,
    filled: Iterable[str],
    trials: Mapping[str, str | None],
) -> Packing:
    """Write what a model on the CPU, loaded from a checkpoint, holds.

    Args:
        path: of the file. filled: the parameters and buffers that came from the checkpoint as they are.
        trials: what trials of its decoder layers showed.
    Raises:
        CheckpointError: the checkpoint changed meanwhile. Else as write_packed.
    """
    state = _state(model)
    tensors = {f"{_PLAIN}{name}": state[name].detach() for name in filled}
    layers: dict[str, tuple[str, list[str]]] = {}
    left: dict[str, str] = {}
    for layer, target in contents.quantized.items():
        place = target.parameter.removesuffix(".weight")
        if target.expert:
            place += f".experts.{target.expert[0]}.{target.expert[1]}"
        module = model.get_submodule(place)
        if not isinstance(module, QLinear) or layer in contents.shared:
            left[layer] = "an embedding, of which rows are looked up"
        elif (form := module.selection.kernel.packed_form()) is None:
            left[layer] = f"kernel {module.selection.kernel.name} keeps no packed weights"
        else:
            own = dict(module.packed.named_buffers()) | ({} if module.order is None else {_ORDER: module.order})
            layers[layer] = (form, list(own))
            tensors |= {f"{layer}/{name}": tensor for name, tensor in own.items()}
    header = {"key": key(checkpoint, contents), "layers": layers, "trials": trials, "programs": programs()}
    checkpoint.check_unchanged()
    return Packing(path, write_packed(path, header, tensors), len(layers), left)
