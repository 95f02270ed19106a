"""NF4 weights through bitsandbytes (pip install bitsandbytes): its CUDA kernels, and its CPU ones."""

from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..base import Kernel, PackedWeight, Serves
from ..qtensor import QTensor
from ..weights.nf4 import NESTED_BLOCK, NF4, NF4_BLOCK, NF4_CODEBOOK, block_scales

# bitsandbytes interleaves 32 output features at a time for its AVX512-BF16 product.
_INTERLEAVED = 32

# That product takes 0.46 ms a row at 16.8 million weights (one core), however many rows there are; undoing the
# interleaving, dequantizing and multiplying in bfloat16 (AMX, likewise) 17 to 20 ms up to 64 rows.
_PRODUCT_ROWS = 40

_PIECE = 512  # output features dequantized at once, so that the pieces stay in cache


class PlainWeight(PackedWeight):
    """The QTensor's own tensors; `nested_*` for nf4-dq only."""

    codes: Tensor
    scales: Tensor
    codebook: Tensor
    nested_absmax: Tensor
    nested_codebook: Tensor
    nested_offset: Tensor


class InterleavedWeight(PlainWeight):
    """`codes`: bitsandbytes' layout for AVX512-BF16, uint8 [out, in / 2]; `scales`: bfloat16 [in / 64, out]."""


class BitsAndBytesNF4(Kernel):
    """nf4 and nf4-dq.

    On CPUs with AVX512-BF16, bfloat16 inputs take a product for which double quantization is undone and the scales are
    rounded to bfloat16: each weight moves by at most 2^-8 of its value; the product, rounded too, stays within a
    relative RMS of 2^-8 of the exact one. Elsewhere the weight is dequantized, or multiplied by on CUDA, as it is.
    """

    rank: ClassVar[int] = 32
    name: ClassVar[str] = "bnb-nf4"
    serves: ClassVar[tuple[Serves, ...]] = (Serves("nf4 and nf4-dq", NF4),)
    only_calls_library: ClassVar[bool] = True
    package: ClassVar[str] = "bitsandbytes"

    def unsupported(self, qtensor: QTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        if reason := self.unserved(qtensor.scheme):
            return reason
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"inputs are {dtype}, expected float16, bfloat16 or float32"
        if device.type not in ("cpu", "cuda"):
            return f"runs on CPUs and CUDA GPUs, not on {device.type}"
        if qtensor.shape[1] % NF4_BLOCK:
            # Its CPU dequantization gives wrong values for some such shapes, [64, 96] for one (0.50.2).
            return f"in_features {qtensor.shape[1]} is not divisible by {NF4_BLOCK}: blocks would run across rows"
        library = _library()
        if isinstance(library, str):
            return library
        if device.type == "cuda" and not library.cextension.lib.compiled_with_cuda:
            return "bitsandbytes loaded no CUDA library; `python -m bitsandbytes` says why"
        return None

    def pack(self, qtensor: QTensor, dtype: torch.dtype) -> PackedWeight:
        library = _library()
        assert not isinstance(library, str)
        codebook = torch.tensor(NF4_CODEBOOK, device=qtensor.codes.device)
        if not _can_interleave(library, qtensor, dtype):
            nested = {name.replace(".", "_"): tensor for name, tensor in qtensor.extra.items()}
            return PlainWeight(qtensor, codes=qtensor.codes, scales=qtensor.scales, codebook=codebook, **nested)
        # The library's helper rewrites the state it is given, and makes new tensors.
        state = _state(library, qtensor.shape, block_scales(dict(qtensor.tensors())), codebook)
        codes, state = library.functional._convert_weight_packed_for_cpu(qtensor.codes, state, _INTERLEAVED)
        return InterleavedWeight(qtensor, codes=codes, scales=state.absmax, codebook=codebook)

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        library = _library()
        assert isinstance(packed, PlainWeight)
        assert not isinstance(library, str)
        out_features, in_features = packed.shape
        rows = x.reshape(-1, in_features).contiguous()
        if len(rows) == 0:
            y = rows.new_empty(0, out_features)
        elif not isinstance(packed, InterleavedWeight):
            y = library.matmul_4bit(rows, packed.codes.view(1, -1), _plain_state(library, packed))
        elif len(rows) <= _PRODUCT_ROWS:
            state = _state(library, packed.shape, packed.scales, packed.codebook)
            state.packing_format_for_cpu = True
            y = library.matmul_4bit(rows, packed.codes, state)
        else:
            y = _multiply_dequantized(library, rows, packed)
        if bias is not None:
            y = y + bias.to(y.dtype)
        return y.view(*x.shape[:-1], out_features)


def _library() -> ModuleType | str:
    """bitsandbytes, or why it cannot be used."""
    try:
        import bitsandbytes
    except ImportError:
        return "bitsandbytes is not installed; pip install bitsandbytes"
    if isinstance(bitsandbytes.cextension.lib, bitsandbytes.cextension.ErrorHandlerMockBNBNativeLibrary):
        return "bitsandbytes could not load its native library; `python -m bitsandbytes` says why"
    return bitsandbytes


def _state(library: Any, shape: tuple[int, int], scales: Tensor, codebook: Tensor, **nested: Any) -> Any:
    """bitsandbytes' description of a weight; made anew for each use because its functions change it."""
    return library.functional.QuantState(scales, torch.Size(shape), codebook, NF4_BLOCK, "nf4", torch.float32, **nested)


def _plain_state(library: Any, packed: PlainWeight) -> Any:
    nested: dict[str, Any] = {}
    if packed.scales.dtype == torch.uint8:  # double quantization
        inner = library.functional.QuantState(
            packed.nested_absmax, code=packed.nested_codebook, blocksize=NESTED_BLOCK, dtype=torch.float32
        )
        nested = {"offset": packed.nested_offset, "state2": inner}
    return _state(library, packed.shape, packed.scales, packed.codebook, **nested)


def _can_interleave(library: Any, qtensor: QTensor, dtype: torch.dtype) -> bool:
    return (
        qtensor.codes.device.type == "cpu"
        and dtype == torch.bfloat16
        and qtensor.shape[0] % _INTERLEAVED == 0
        and bool(library.functional.has_avx512bf16())
    )


def _multiply_dequantized(library: Any, x: Tensor, packed: InterleavedWeight) -> Tensor:
    """bfloat16 x [rows, in] -> [rows, out], the weight dequantized a piece at a time from the interleaved layout."""
    out_features, in_features = packed.shape
    y = x.new_empty(len(x), out_features)
    for start in range(0, out_features, _PIECE):
        piece = slice(start, start + _PIECE)
        codes = _plain_codes(packed.codes[piece])
        scales = packed.scales[:, piece].t().to(torch.float32).contiguous()
        state = _state(library, (len(codes), in_features), scales.flatten(), packed.codebook)
        state.dtype = x.dtype
        y[:, piece] = x @ library.functional.dequantize_4bit(codes.view(-1, 1), state).t()
    return y


def _plain_codes(interleaved: Tensor) -> Tensor:
    """uint8 [out, in / 2] as AVX512-BF16 wants it -> as NF4 is stored, the even element in the high nibble.

    Interleaved, a block of 32 rows is [in / 2, 16, 2]: byte [c, r, e] has input feature 2c + e of row r in its low
    nibble and that of row 16 + r in its high one. Both bytes of a pair are treated as one int16, which halves the work.
    """
    half, pairs = _INTERLEAVED // 2, interleaved.shape[1]
    both = interleaved.view(torch.int16).view(-1, pairs, half).transpose(1, 2).contiguous()
    rows = interleaved.new_empty(len(both), 2, half, pairs)
    rows[:, 0] = (both << 4 & 240) | (both >> 8 & 15)
    rows[:, 1] = (both & 240) | (both >> 12 & 15)
    return rows.view(interleaved.shape)


PLUGINS = (BitsAndBytesNF4(),)
