"""What every coded source says about itself, and how its small floats become the weights that they stand for.

A weight is codes times scales. The codes are E4M3 or E5M2 (Micikevicius et al., FP8 Formats for Deep Learning, 2022),
or E2M1, two to a byte (OCP Microscaling Formats v1.0, 2023, section 5.3.3). Each scale serves a block of the weight.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitpress.kernels.weights.e2m1 import MAGNITUDES

from ..tensor_info import TensorInfo

ReadRows = Callable[[TensorInfo, int, int], Tensor]  # rows from start to stop of a tensor, as it lies in the file
Block = tuple[int | None, int | None]  # the rows and columns that one scale serves; None for all of them

PER_TENSOR: Block = (None, None)
PER_CHANNEL: Block = (1, None)
SQUARES: Block = (128, 128)

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_EXPONENTS = (torch.float8_e8m0fnu, torch.uint8)  # E8M0: 2^(v - 127), and 255 is NaN
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, *_EXPONENTS)
_E8M0 = torch.tensor([math.ldexp(1.0, value - 127) for value in range(255)] + [math.nan])
_E2M1 = [sign * value for sign in (1.0, -1.0) for value in MAGNITUDES]
_E2M1_PAIRS = torch.tensor([(low, high) for high in _E2M1 for low in _E2M1]).view(torch.int64).flatten()  # by byte
_SCALE_NAMES = ("weight_scale_inv", "weight_scale", "weight_scale_2", "weight_global_scale", "qscale_weight")
# What a runtime wants for inputs and for the cache of keys and values; the weights do not depend on it.
_OTHER_SCALES = {
    "input_scale", "input_scale_ub", "input_global_scale", "input_zero_point", "activation_scale", "qscale_act",
    "k_scale", "v_scale", "q_scale", "output_scale", "prob_output_scale",
}  # fmt: skip


@dataclass(frozen=True)
class CodedWeight:
    """One weight in the files: codes, and the scales that multiply them.

    codes: float8 [.., N, K], or bytes of two E2M1 codes each, the low half first.
    shape: [.., N, K], of the values that the codes stand for, with at most one dimension before the last two.
    scales: one for each block; the last blocks are cut where the shape is no multiple of theirs.
    block: the rows and columns that a scale serves.
    factor: one number that multiplies all scales or, where `divides`, divides them.
    transposed: the model has [.., K, N].
    """

    codes: TensorInfo
    shape: tuple[int, ...]
    scales: TensorInfo
    block: tuple[int, int]
    factor: TensorInfo | None = None
    divides: bool = False
    transposed: bool = False

    @property
    def parts(self) -> list[TensorInfo]:
        """Its tensors in the files, the codes first."""
        return [self.codes, self.scales, *([self.factor] if self.factor else [])]

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """The shape that the model has."""
        return (*self.shape[:-2], *self.shape[:-3:-1]) if self.transposed else self.shape

    def rows(self, start: int, stop: int, read: ReadRows) -> Tensor:
        """Rows of the dense weight, float32: each value is a code times its scale, rounded to float32.

        Raises:
            ValueError: codes that are NaN or infinite, or scales that are NaN, infinite or not positive.
        """
        values, unit = _values(read(self.codes, start, stop))
        (height, width), columns = self.block, self.shape[-1]
        if len(self.shape) == 2:
            first, last = start // height, -(-stop // height)
            row = torch.arange(start, stop) // height - first
            grid: tuple[int, ...] = (last - first,)
        else:  # a row is a matrix with scales of its own
            first, last = start, stop
            row, grid = torch.arange(self.shape[-2]) // height, (stop - start, -(-self.shape[-2] // height))
        scales = _positive(self.scales, read(self.scales, first, last)).reshape(*grid, -(-columns // width))
        if self.factor is not None:
            factor = _positive(self.factor, read(self.factor, 0, 1)).reshape(())
            scales = scales / factor if self.divides else scales * factor
        scales = scales[..., row, :].flatten(0, -2) * unit
        values = values.reshape(-1, columns)
        whole = columns // width * width
        values[:, :whole].unflatten(1, (-1, width)).mul_(scales[:, : whole // width, None])
        values[:, whole:].mul_(scales[:, whole // width :])
        values = values.reshape(stop - start, *self.shape[1:])
        return values.transpose(-1, -2) if self.transposed else values


def _values(codes: Tensor) -> tuple[Tensor, float]:
    """float32 values of codes, and the power of two that they have to be multiplied by yet.

    A float8 code is moved into the bits of a float16, which has the same exponents but for their bias: several times as
    fast as torch's conversion.

    Raises:
        ValueError: codes that are NaN or infinite.
    """
    if codes.dtype not in FLOAT8:
        pairs = torch.index_select(_E2M1_PAIRS, 0, codes.view(torch.uint8).flatten().to(torch.int32))
        return pairs.view(torch.float32), 1.0
    wide = codes.view(torch.int8).to(torch.int16)  # the sign in bits 7 to 15
    if codes.dtype == torch.float8_e5m2:
        bad, unit = int(((wide & 0x7C) == 0x7C).sum()), 1.0
        wide <<= 8
    else:
        magnitude = codes.view(torch.uint8) & 0x7F
        bad, unit = int((magnitude == 0x7F).sum()) if magnitude.numel() and magnitude.max() == 0x7F else 0, 256.0
        wide <<= 7
        wide &= ~0x4000  # the highest bit of the exponent, which E4M3 does not have
    if bad:
        raise ValueError(f"{bad} of its codes are NaN or infinite")
    return wide.view(torch.float16).to(torch.float32), unit


def _positive(info: TensorInfo, scales: Tensor) -> Tensor:
    """Scales as float32.

    Raises:
        ValueError: they are NaN, infinite or not positive. One in E4M3 may be zero: that of a block whose values are
            all too small.
    """
    values = _E8M0[scales.view(torch.uint8).long()] if info.dtype in _EXPONENTS else scales.to(torch.float32)
    least = 0.0 if info.dtype == torch.float8_e4m3fn else torch.finfo(torch.float32).smallest_normal / 2**23
    if bad := int((~(torch.isfinite(values) & (values >= least))).sum()):
        raise ValueError(f"{bad} scales in {info.name} are NaN, infinite or not positive")
    return values


@dataclass
class Coding:
    """What a source's files hold.

    weights: name of each dense weight, as the model knows it -> its codes and scales.
    other_scales: tensors that belong to the coding and to no weight.
    problems: what is wrong with the files, a sentence each.
    """

    weights: dict[str, CodedWeight] = field(default_factory=dict)
    other_scales: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Source(ABC):
    """How the weights of unquantized models lie coded in files; bitpress reads such files, and never writes them.

    A source is one file in this folder that lists an instance of it in PLUGINS. See mxfp4.py for an example.

    name: what inspect calls it. rank: the place in the order in which sources are asked, the lowest first.
    quant_methods: what config.json calls it.
    side_files: other files that may describe the coding; no artifact gets a copy of them.
    """

    name: ClassVar[str]
    rank: ClassVar[int]
    quant_methods: ClassVar[tuple[str, ...]] = ()
    side_files: ClassVar[tuple[str, ...]] = ()

    def section(self, config: Mapping[str, Any], side_files: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
        """What describes the coding, where it is this source's; else None.

        Args:
            config: config.json, untrusted. side_files: name -> content, of those that are there, untrusted.
        """
        section = config.get("quantization_config")
        return section if isinstance(section, dict) and section.get("quant_method") in self.quant_methods else None

    @abstractmethod
    def coding(self, section: Mapping[str, Any], stored: Mapping[str, TensorInfo]) -> Coding:
        """The weights of a checkpoint, from headers alone.

        Args:
            section: as `section` gave it, untrusted. stored: all tensors of the files.
        """


def float8_coding(stored: Mapping[str, TensorInfo], blocks: Sequence[Block], packed: Sequence[Block] = ()) -> Coding:
    """Every float8 tensor with the tensor of its scales beside it; whatever lies there alone is a problem.

    Args:
        blocks: that scales may serve, in the order in which they are tried against the shapes.
        packed: the same of int8 tensors, each of whose bytes holds two E2M1 codes; by default there are none.
    """
    coding, used = Coding(), set[str]()
    for name, info in stored.items():
        halves = bool(packed) and info.dtype == torch.int8
        if (info.dtype not in FLOAT8 and not halves) or name.rpartition(".")[2] in _SCALE_NAMES:
            continue
        shape = (*info.shape[:-1], 2 * info.shape[-1]) if halves and info.shape else info.shape
        stem = name.removesuffix(".weight")
        candidates = (f"{name}_scale_inv", f"{name}_scale", f"{stem}.scale", f"{stem}.qscale_weight")
        scales = [stored[candidate] for candidate in candidates if candidate in stored]
        used.update(each.name for each in scales)
        if len(scales) != 1:
            names = " and ".join(each.name for each in scales)
            coding.problems.append(
                f"{name} is {_dtype(info)} and has several tensors of scales: {names}"
                if scales
                else f"{name} is {_dtype(info)} and its scales are missing: no {candidates[0]} or {candidates[1]}"
            )
        elif isinstance(block := fitting_block(shape, scales[0], packed if halves else blocks), str):
            coding.problems.append(block)
        else:
            coding.weights[name] = CodedWeight(info, shape, scales[0], block)
    set_aside(coding, stored, used)
    return coding


def packed_coding(
    stored: Mapping[str, TensorInfo], codes: str, group: int, factor: str | None = None, divides: bool = False
) -> Coding:
    """Every `X.<codes>` of bytes, two E2M1 codes each, as the weight of X, with X.weight_scale beside it.

    Args:
        group: codes of a row that share a scale. factor: the name of the number that multiplies all scales of a weight
            or, where `divides`, divides them.
    """
    coding, used = Coding(), set()
    for name, info in stored.items():
        stem = name.removesuffix(f".{codes}")
        if stem == name or info.dtype != torch.uint8:
            continue
        parts = [f"{stem}.weight_scale", *([f"{stem}.{factor}"] if factor else [])]
        used.update([name, *parts])
        if absent := [part for part in parts if part not in stored]:
            coding.problems.append(f"{absent[0]} is missing, which belongs to {name}")
            continue
        shape = (*info.shape[:-1], 2 * info.shape[-1]) if info.shape else ()
        block = fitting_block(shape, stored[parts[0]], [(1, group)])
        if isinstance(block, str):
            coding.problems.append(block)
        elif factor and math.prod(stored[parts[1]].shape) != 1:
            coding.problems.append(f"{parts[1]} has shape {list(stored[parts[1]].shape)}, expected a single number")
        else:
            number = stored[parts[1]] if factor else None
            coding.weights[f"{stem}.weight"] = CodedWeight(info, shape, stored[parts[0]], block, number, divides)
    set_aside(coding, stored, used)
    return coding


def set_aside(coding: Coding, stored: Mapping[str, TensorInfo], used: Iterable[str]) -> None:
    """Sort the tensors that are no weights: scales of a weight, scales of something else, or a problem.

    Args:
        used: the scales of weights.
    """
    for name in stored.keys() - set(used) - coding.weights.keys():
        leaf = name.rpartition(".")[2]
        if leaf in _OTHER_SCALES:
            coding.other_scales.append(name)
        elif leaf in _SCALE_NAMES or leaf.endswith("_scale_inv") or stored[name].dtype in _EXPONENTS[:1]:
            coding.problems.append(f"{name} is the scale of a weight that is not in the files, or not coded")
    coding.other_scales.sort()
    coding.problems.sort()


def fitting_block(shape: tuple[int, ...], scales: TensorInfo, blocks: Sequence[Block]) -> tuple[int, int] | str:
    """The first of `blocks` for which a weight [.., N, K] has scales of the shape that they have; or why none fits."""
    if scales.dtype not in _SCALE_DTYPES:
        return f"{scales.name} is {_dtype(scales)}, which is no dtype of scales"
    if len(shape) not in (2, 3) or 0 in shape:
        return f"the weight of {scales.name} has shape {list(shape)}, expected a matrix, or one of each expert"
    expected = []
    for height, width in blocks:
        block = (min(height or shape[-2], shape[-2]), min(width or shape[-1], shape[-1]))
        grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
        same = [size for size in scales.shape if size != 1] == [size for size in grid if size != 1]
        if same and (scales.shape or (1,))[0] == grid[0]:
            return block
        expected.append(list(grid))
    wanted = " or ".join(map(str, dict(zip(map(str, expected), expected)).values()))
    return f"{scales.name} has shape {list(scales.shape)}, expected {wanted} for a weight of shape {list(shape)}"


def block_size(value: Any) -> Block | None:
    """A block from a config's value: two whole numbers; None for anything else."""
    sizes = value if isinstance(value, list | tuple) else ()
    if len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes):
        return sizes[0], sizes[1]
    return None


def _dtype(info: TensorInfo) -> str:
    return str(info.dtype).removeprefix("torch.")
