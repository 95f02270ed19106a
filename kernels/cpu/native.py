"""Weights of 2 to 8 bits, NF4, FP4 and FP8 on the CPU, by csrc/: VNNI and AMX where the machine has them.

Inputs are quantized as they come, one scale per row and group of weights (at most 128 features; the whole row for
int8-dynamic, as that scheme has it), products summed in int32 and scaled in float32. By default ordinary inputs have 8
bits and outliers 16, which adds next to nothing to what weights of 4 bits or less lose; beside weights of 8 bits all
have 16. 8 bits for all may lose more than the weights of an int4 file did. Or inputs stay as they are, always beside
FP8 weights, which are no whole numbers: E4M3 spans 18 bits.
"""

import contextlib
import functools
import mmap
import re
import threading
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import products
from ..activations.base import Activations
from ..activations.fp8 import Fp8Group, Fp8Tensor, Fp8Token
from ..activations.int8_tensor import Int8Tensor, Int8TensorAsymmetric
from ..activations.int8_token import Int8Token, Int8TokenAsymmetric
from ..base import Kernel, PackedWeight, Serves
from ..packing import pack, unpack
from ..qtensor import QTensor
from ..scheme import Scheme
from ..weights.fp8 import Float8, Float8Tensor
from ..weights.integer import INT_BITS, Integer
from ..weights.mxfp4 import MXFP4
from ..weights.nf4 import NF4, NF4_BLOCK
from ..weights.nvfp4 import NVFP4
from .library import Library, library, pending

INT8, INT16, FLOAT32, MIXED = range(4)  # what inputs are rounded to, as csrc/ numbers it
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as csrc/ numbers them
_INT4, _TABLE, _INT8, _FP8 = range(4)
_NF4, _FP4 = range(2)  # tables

# The number of the layout of packed weights: a new one whenever _pack makes other bytes of the same weight.
_LAYOUT = 2

_STEP = 128  # features that share an activation scale, where a group of weights has no fewer
_HEADER = 128  # bytes
_ALIGNMENT = 64  # bytes, of where packed weights begin
_LANES = 16  # of the widest registers
_PIECE = 512  # output features dequantized at once
_HUGE_PAGE = 2 << 20  # bytes
_SHARED = 16 << 20  # bytes that smaller weights share

_TABLE_ZERO = 128  # is added to what a table says in int8 where weights must be unsigned

# From so many rows on, inputs that stay as they are meet a dequantized weight and torch's own product.
_EXACT_ROWS = 48


class NativeWeight(PackedWeight):
    """`data` uint8 [bytes]: a header and what csrc/bitpress.h calls Weight. `instructions`: which set multiplies. Other
    buffers are what the inputs' type stores, where inputs are rounded before csrc/ gets them."""

    data: Tensor
    instructions: int


class NativeInt8(Kernel):
    """Inputs quantized to INT8: each changes by at most 1/254 of the largest in its group.

    NF4's code book is rounded too, by at most 0.0028 of its range; scales to float16, relative to their row's largest.
    """

    rank: ClassVar[int] = 10
    name: ClassVar[str] = "native-int8"
    serves: ClassVar[tuple[Serves, ...]] = (
        Serves("integer weights of 2, 3, 4 or 8 bits", Integer, INT_BITS),
        Serves("nf4, nf4-dq", NF4),
        Serves("mxfp4", MXFP4),
        Serves("nvfp4", NVFP4),
        Serves("int8-dynamic", Integer, (8,), Int8Token),
        Serves("int8-dynamic-asym", Integer, (8,), Int8TokenAsymmetric),
        Serves("int8-static", Integer, (8,), Int8Tensor),
        Serves("int8-static-asym", Integer, (8,), Int8TensorAsymmetric),
    )
    input_bits: ClassVar[tuple[int, int] | None] = (8, 8)
    inputs: ClassVar[int] = INT8

    def __init__(self, instructions: str | None = None):
        """`instructions`: the name of one set of csrc/, for tests; by default the machine's best."""
        self.instructions = instructions

    def unsupported(self, qtensor: QTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"runs on CPUs, not on {device.type}"
        if dtype not in DTYPES:
            return f"inputs are {dtype}, expected float16, bfloat16 or float32"
        if reason := self.unserved(qtensor.scheme) or _misfit(qtensor.scheme, qtensor.shape[1]):
            return reason
        native = library()
        return native if isinstance(native, str) else None

    def pending(self, device: torch.device) -> str | None:
        return pending() if device.type == "cpu" else None

    def exact(self) -> Kernel | None:
        return NativeExact(self.instructions)

    def about(self) -> str:
        """Which instruction set serves, and where the library comes from."""
        native = library()
        assert isinstance(native, Library)
        return f"{native.instructions[self.chosen()]}, {native.origin}"

    def pack(self, qtensor: QTensor, dtype: torch.dtype) -> PackedWeight:
        static = _apart(qtensor.scheme)
        stored = {name: qtensor.extra[name] for name in (static.layout() if static else ())}
        return self._packed(qtensor, data=_pack(_shared(), qtensor), **stored)

    def packed_form(self) -> str | None:
        """The layout is the same for all sets of instructions today, and need not stay so."""
        native = library()
        return f"native-{_LAYOUT}-{native.instructions[self.chosen()]}" if isinstance(native, Library) else None

    def restore(self, qtensor: QTensor, tensors: Mapping[str, Tensor]) -> PackedWeight:
        """`data` must begin with the very header that this weight gets: all that the library finds anything by. Every
        code, scale and zero point is a number to it, whatever its bits."""
        static = _apart(qtensor.scheme)
        if tensors.keys() != {"data", *(static.layout() if static else ())}:
            raise ValueError(f"it holds {', '.join(sorted(tensors))}")
        data, (header, size, _) = tensors["data"], _layout(_shared(), qtensor)
        if (data.dtype, data.shape) != (torch.uint8, (size,)) or data.data_ptr() % _ALIGNMENT:
            raise ValueError(f"data is {data.dtype} {list(data.shape)}, expected {size} bytes, well aligned")
        if not torch.equal(data[:_HEADER], header):
            raise ValueError("its header is that of another weight")
        if static:
            for name, (shape, dtypes) in static.layout().items():
                if tuple(tensors[name].shape) != shape or tensors[name].dtype not in dtypes:
                    raise ValueError(f"{name} is {tensors[name].dtype} {list(tensors[name].shape)}")
            static.check(dict(tensors))
        return self._packed(qtensor, **tensors)

    def _packed(self, qtensor: QTensor, **tensors: Tensor) -> PackedWeight:
        packed = NativeWeight(qtensor, **tensors)
        packed.instructions = self.chosen()
        return packed

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        assert isinstance(packed, NativeWeight)
        if x.shape[-1] != packed.shape[1] or x.dtype not in DTYPES:  # the library trusts them
            expected = f"[..., {packed.shape[1]}] of float16, bfloat16 or float32"
            raise ValueError(f"inputs are {list(x.shape)} of {x.dtype}, expected {expected}")
        return torch.ops.bitpress.linear_cpu(x, packed.data, bias, packed.shape[0], self.inputs, packed.instructions)

    def chosen(self) -> int:
        """Which set of instructions serves, as the library counts them."""
        native = library()
        assert isinstance(native, Library)
        return native.instructions.index(self.instructions) if self.instructions else native.best


class NativeInt16(NativeInt8):
    """Inputs quantized to INT16: each changes by at most 1/65278 of the largest in its group.

    The weights are read once, as for INT8, and take twice the products: where memory decides, that costs nothing. NF4's
    code book and scales are rounded as NativeInt8 does it.
    """

    rank: ClassVar[int] = 12
    name: ClassVar[str] = "native-int16"
    serves: ClassVar[tuple[Serves, ...]] = (
        *(each for each in NativeInt8.serves if each.activations is None),
        Serves("int4-g128-int8-dynamic and others of 2 to 4 bits", Integer, (2, 3, 4), Int8Token),
    )
    input_bits: ClassVar[tuple[int, int] | None] = (16, 16)
    inputs: ClassVar[int] = INT16

    def unserved(self, scheme: Scheme) -> str | None:
        quantizes = scheme.activations is not None and not rounds_inputs(scheme)
        return f"{scheme.name} quantizes its inputs" if quantizes else super().unserved(scheme)

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        if not rounds_inputs(packed.scheme):
            return super().linear(x, packed, bias)
        assert packed.scheme.activations is not None
        stored = {name: tensor for name, tensor in packed.named_buffers() if name != "data"}
        return super().linear(packed.scheme.activations.apply(x, stored), packed, bias).to(x.dtype)


class NativeMixed(NativeInt16):
    """Inputs quantized to INT8, and outliers among them to INT16.

    LLM.int8 (arXiv 2208.07339) keeps whole features in 16 bits; here it is single inputs. The usual input of a step has
    a code of 18 or more, and one whose code exceeds 127 gets 16 bits. So each input changes by at most 1/36 of the
    usual size (the square of the mean of roots), or by 1/65278 of the largest if that is more: `wide_scale` in
    csrc/generic.h. docs/measurements.md has what it costs, and how 18 was chosen.
    """

    rank: ClassVar[int] = 11
    name: ClassVar[str] = "native-mixed"
    serves: ClassVar[tuple[Serves, ...]] = (
        Serves("integer weights of 2 to 4 bits", Integer, (2, 3, 4)),
        Serves("nf4, nf4-dq", NF4),
        Serves("mxfp4", MXFP4),
        Serves("nvfp4", NVFP4),
    )
    input_bits: ClassVar[tuple[int, int] | None] = (8, 16)
    inputs: ClassVar[int] = MIXED


class NativeExact(NativeInt16):
    """Inputs stay as they are, or as the scheme rounds them: weights are dequantized in registers, and multiplied in
    float32."""

    rank: ClassVar[int] = 13
    name: ClassVar[str] = "native-bf16"
    serves: ClassVar[tuple[Serves, ...]] = (
        *NativeInt16.serves,
        Serves("fp8, fp8-b128", Float8),
        Serves("fp8-tensor", Float8Tensor),
        Serves("fp8-dynamic", Float8, (), Fp8Token),
        Serves("fp8-tensor-dynamic", Float8Tensor, (), Fp8Token),
        Serves("fp8-block", Float8, (), Fp8Group),
        Serves("fp8-static", Float8, (), Fp8Tensor),
        Serves("fp8-tensor-static", Float8Tensor, (), Fp8Tensor),
    )
    input_bits: ClassVar[tuple[int, int] | None] = None
    inputs: ClassVar[int] = FLOAT32

    def exact(self) -> Kernel | None:
        return None


def rounds_inputs(scheme: Scheme) -> bool:
    """Whether inputs are rounded before csrc/ gets them, which rounds by groups of weights, and to integers only."""
    return scheme.activations is not None and (scheme.joined or scheme.weight.description().type == "float")


def _apart(scheme: Scheme) -> Activations | None:
    """The type of inputs whose tensors are kept beside the packed weight; None: there are none, or they are in it."""
    return scheme.static if rounds_inputs(scheme) else None


def inputs_of(kernel: Kernel) -> int | None:
    """What a native kernel rounds inputs to, as csrc/ numbers it; None of another kernel."""
    return kernel.inputs if isinstance(kernel, NativeInt8) else None


def _misfit(scheme: Scheme, in_features: int) -> str | None:
    """Why csrc/ cannot multiply by a weight of so many input features; None if it can."""
    kind = scheme.weight.description().type
    if kind == "codebook" and in_features % NF4_BLOCK:
        return f"in_features {in_features} is not divisible by {NF4_BLOCK}: blocks would run across rows"
    if kind == "int" and scheme.group_size and scheme.group_size % 32:
        return f"group_size {scheme.group_size} is not a multiple of 32"
    if scheme.activations is not None and not rounds_inputs(scheme) and in_features > 1 << 16:
        return f"in_features {in_features} is more than 65536: sums of products could exceed int32"
    return None


def _layout(native: Library, qtensor: QTensor) -> tuple[Tensor, int, bool]:
    """The header of a packed weight, uint8 [128]; the bytes of the whole; and whether each row has one scale, which
    then is its multiplier. The scheme and the shape decide, not the content."""
    scheme, (out_features, in_features) = qtensor.scheme, qtensor.shape
    kind = scheme.weight.description().type
    if kind == "float" and scheme.bits == 8:
        code, zero = _FP8, 0
    elif kind == "int":
        code, zero = _INT8 if scheme.bits == 8 else _INT4, scheme.middle
    else:
        code, zero = _TABLE, _TABLE_ZERO
    step, group = _grouping(scheme, in_features)
    single = group >= in_features
    header = torch.zeros(_HEADER, dtype=torch.uint8)
    table = _NF4 if kind == "codebook" else _FP4  # of code books, NF4 is the only one that is served
    layout = (out_features, in_features, group, step, code, table, zero)
    apart = rounds_inputs(scheme)
    has_inputs, has_shifts = not apart and scheme.static is not None, not apart and scheme.shifts_inputs
    size = native.lib.bitpress_layout(
        header.data_ptr(), *layout, not single, qtensor.zeros is not None, has_inputs, has_shifts
    )
    assert size > 0, layout
    return header, size, single


def _pack(native: Library, qtensor: QTensor) -> Tensor:
    """The header and everything after it, as csrc/ reads it."""
    scheme, (out_features, in_features) = qtensor.scheme, qtensor.shape
    kind, codes = scheme.weight.description().type, qtensor.codes
    is_nf4 = kind == "codebook"
    if kind == "float" and scheme.bits == 8:
        codes = _words(F.pad(codes.view(torch.uint8), (0, -in_features % 4)), out_features)
    elif kind != "int":
        codes = _words(codes, out_features)
    elif scheme.bits in (2, 3):
        codes = pack(unpack(codes, scheme.bits, in_features), 4)
    header, size, single = _layout(native, qtensor)
    packed = _pool.take(native, size)
    packed[:_HEADER] = header
    words, strides = codes.shape[1], codes.stride()
    native.lib.bitpress_pack(packed.data_ptr(), codes.data_ptr(), words, *strides, is_nf4, torch.get_num_threads())
    _fill_scales(packed, qtensor, single)
    _fill_inputs(packed, qtensor)
    return packed


def _words(codes: Tensor, out_features: int) -> Tensor:
    """uint8 codes of any strides as int32 [out, words]."""
    return codes.flatten().view(torch.int32).view(out_features, -1)  # flat first: a single row may have any stride


class _Pool:
    """Memory for packed weights, zeros, in pages of 2 MiB where the system has them: it is read twice as fast then.

    Weights lie side by side, each as a storage of its own. What they share is given back when none of them is left.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pages: mmap.mmap | None = None
        self.start = self.end = 0  # of what is not taken yet

    def take(self, native: Library, size: int) -> Tensor:
        """uint8 [size], zeros, at a multiple of 128 bytes."""
        with self.lock:
            if self.pages is None or self.end - self.start < size:
                length = -(-max(size, _SHARED) // _HUGE_PAGE) * _HUGE_PAGE
                # More addresses are asked for than are used: no page of the others is ever touched.
                self.pages = mmap.mmap(-1, length + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                address = torch.frombuffer(self.pages, dtype=torch.uint8).data_ptr()
                self.start = -address % _HUGE_PAGE
                self.end = self.start + length
                native.lib.bitpress_use_huge_pages(address + self.start, length)
            taken = torch.frombuffer(self.pages, dtype=torch.uint8, offset=self.start, count=size)
            self.start += -(-size // _HEADER) * _HEADER
            return taken


_pool = _Pool()


def _grouping(scheme: Scheme, in_features: int) -> tuple[int, int]:
    """Features that share an activation scale, and features that share a weight scale, as csrc/ counts them."""
    group = scheme.group_size
    if group is None:
        whole = -(-in_features // _STEP) * _STEP
        return (_STEP if scheme.activations is None or rounds_inputs(scheme) else whole), whole
    step = next(step for step in (_STEP, 96, 64, 32, 16) if group % step == 0)
    return step, group


def _fill_scales(packed: Tensor, qtensor: QTensor, single: bool) -> None:
    """scales = float16(scale / multiplier), the multiplier a power of two for each row, so that only small scales,
    of less than 2^-28 of the row's largest, lose more than float16's 11 bits; zeros as they are."""
    out_features, factored = qtensor.shape[0], getattr(qtensor.scheme.weight, "factored_scales", None)
    scales, factor = factored(qtensor.shape, dict(qtensor.tensors())) if factored else (qtensor.scales, 1.0)
    scales = scales.to(torch.float32).view(out_features, -1)
    offsets = packed[:_HEADER].view(torch.int64).tolist()
    scale_at, zero_at, multiplier_at = offsets[9:12]
    multiplier = scales[:, 0]
    if not single:
        _, exponent = torch.frexp(scales.abs().amax(1))
        multiplier = torch.ldexp(torch.ones(out_features), exponent - 15)
        _put(packed, scale_at, (scales / multiplier.unsqueeze(1)).to(torch.float16))
    if qtensor.zeros is not None:
        _put(packed, zero_at, qtensor.zeros)
    packed[multiplier_at:].view(torch.float32)[:out_features] = multiplier * factor


def _fill_inputs(packed: Tensor, qtensor: QTensor) -> None:
    """The scale and the zero point of inputs that all share one, and what zero points multiply."""
    scheme, offsets = qtensor.scheme, packed[:_HEADER].view(torch.int64).tolist()
    inputs_at, shifts_at = offsets[14:]
    if inputs_at:
        assert scheme.static is not None
        _, scale, zero = scheme.static.codes(torch.zeros(1, 1), qtensor.extra)
        inputs = packed[inputs_at:].view(torch.float32)
        inputs[0], inputs[1] = scale.item(), 0 if zero is None else zero.item()
    if shifts_at:
        weight_zeros = scheme.middle if qtensor.zeros is None else qtensor.zeros.to(torch.int64)
        sums = (unpack(qtensor.codes, 8, qtensor.shape[1]).to(torch.int64) - weight_zeros).sum(1)
        packed[shifts_at:].view(torch.int32)[: len(sums)] = sums


def _put(packed: Tensor, at: int, values: Tensor) -> None:
    """[out, groups] -> [blocks, groups, 16] at byte `at`; outputs beyond the last are left 0."""
    padded = F.pad(values, (0, 0, 0, -len(values) % 32))
    data = padded.unflatten(0, (-1, 16)).transpose(1, 2).contiguous().flatten().view(torch.uint8)
    packed[at : at + data.numel()] = data


def page_in(mapped: Tensor) -> bool:
    """Bring a mapped file into memory, in huge pages where its file system has them; returns whether all can be read.

    Python's other threads go on meanwhile.
    """
    return _shared().lib.bitpress_page_in(mapped.data_ptr(), mapped.nbytes) == 0


def mapped_in_huge_pages(mapped: Tensor) -> bool:
    """Whether the beginning of a mapped file, once it is in memory, lies in huge pages; True where nothing tells."""
    page_in(mapped[: 2 * _HUGE_PAGE])
    inside = False
    with contextlib.suppress(OSError), open("/proc/self/smaps") as mappings:
        for line in mappings:
            if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                inside = int(match[1], 16) <= mapped.data_ptr() < int(match[2], 16)
            elif inside and line.startswith("FilePmdMapped:"):
                return int(line.split()[1]) > 0
    return True


def copied(tensor: Tensor) -> Tensor:
    """A copy of bytes, uint8 [n], in huge pages where the system has them."""
    return _pool.take(_shared(), tensor.numel()).copy_(tensor)


def dense_unsupported(weight: Tensor) -> str | None:
    """Why dense_linear cannot multiply by a weight [out, in], in a few words; None if it can."""
    native = library()
    if isinstance(native, str):
        return native
    if weight.device.type != "cpu" or weight.dtype not in DTYPES or weight.dim() != 2 or not weight.is_contiguous():
        return "its weight is not one matrix of float32, float16 or bfloat16 on the CPU"
    return f"in_features {weight.shape[1]} is not a multiple of {_LANES}" if weight.shape[1] % _LANES else None


def dense_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times a supported dense weight [out, in] of the same dtype -> [..., out], summed up in float32.

    For a few rows, whose product takes as long as the weight is read: twice as fast as torch's own with bfloat16 on
    CPUs without AMX.
    """
    native = _shared()
    rows = x.to(torch.float32).contiguous()
    y = torch.empty(*x.shape[:-1], len(weight), dtype=weight.dtype)
    status = native.lib.bitpress_dense(
        weight.data_ptr(), rows.data_ptr(), y.data_ptr(), rows.numel() // rows.shape[-1], *weight.shape,
        DTYPES[weight.dtype], native.best, torch.get_num_threads(),
    )  # fmt: skip
    assert status == 0
    return y


def touch(tensor: Tensor) -> int:
    """Read every byte (of whole 128 KiB pieces) with torch's threads, as fast as they can; returns a checksum."""
    native = _shared()
    return int(native.lib.bitpress_read(tensor.data_ptr(), tensor.nbytes, native.best, torch.get_num_threads()))


@functools.cache
def _shared() -> Library:
    native = library()
    if isinstance(native, str):
        raise RuntimeError(native)
    return native


def _linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, inputs: int, instructions: int
) -> Tensor:
    if inputs == FLOAT32 and x.numel() >= _EXACT_ROWS * x.shape[-1]:
        return _multiply_dequantized(x, packed, bias, out_features, instructions)
    rows = x.numel() // x.shape[-1]
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], out_features)
    if bias is not None and bias.dtype != torch.float32:
        bias = bias.to(torch.float32)
    status = _shared().lib.bitpress_linear(
        packed.data_ptr(), x.data_ptr(), rows, DTYPES[x.dtype], None if bias is None else bias.data_ptr(),
        y.data_ptr(), inputs, instructions, torch.get_num_threads(),
    )  # fmt: skip
    if status:
        raise MemoryError(f"no memory to multiply {rows} rows by a weight [{out_features}, {x.shape[-1]}]")
    return y


def _multiply_dequantized(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, instructions: int
) -> Tensor:
    """torch's or oneDNN's product with the weight, a piece at a time, so that the pieces stay in cache."""
    y = x.new_empty(*x.shape[:-1], out_features)
    for start in range(0, out_features, _PIECE):
        count = min(_PIECE, out_features - start)
        weight = dequantize(packed, x.dtype, instructions, start, count, x.shape[-1])
        y[..., start : start + count] = products.linear(x, weight)
    return y if bias is None else y + bias.to(y.dtype)


def dequantize(
    packed: Tensor, dtype: torch.dtype, instructions: int, start: int, count: int, in_features: int
) -> Tensor:
    """Output features start .. start + count of the weight that `packed` stands for, [count, in_features]."""
    weight = torch.empty(count, in_features, dtype=dtype)
    threads = torch.get_num_threads()
    status = _shared().lib.bitpress_dequantize(
        packed.data_ptr(), start, count, DTYPES[dtype], weight.data_ptr(), instructions, threads
    )
    assert status == 0
    return weight


_ops = torch.library.Library("bitpress", "FRAGMENT")
_ops.define(
    "linear_cpu(Tensor x, Tensor packed, Tensor? bias, int out_features, int inputs, int instructions) -> Tensor"
)
_ops.impl("linear_cpu", _linear, "CPU")


@torch.library.register_fake("bitpress::linear_cpu", lib=_ops)
def _(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, inputs: int, instructions: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, *_, instructions = inputs
    ctx.save_for_backward(packed)
    ctx.in_features, ctx.instructions = x.shape[-1], instructions


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The weight and the bias are constants; inputs that were rounded count as if they had not been."""
    (packed,) = ctx.saved_tensors
    weight = dequantize(packed, grad.dtype, ctx.instructions, 0, grad.shape[-1], ctx.in_features)
    return products.linear(grad, weight.t()), None, None, None, None, None


torch.library.register_autograd("bitpress::linear_cpu", _backward, setup_context=_remember, lib=_ops)


PLUGINS = (NativeInt8(), NativeMixed(), NativeInt16(), NativeExact())
