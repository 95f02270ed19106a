"""Who takes part in the kernel benchmark: kernels, torch's dense layer, and torch's operators that no kernel uses."""

import itertools
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..activations.int8_token import Int8Token
from ..base import Kernel, PackedWeight, Serves
from ..packing import unpack
from ..qtensor import QTensor
from ..registry import registry
from ..weights.integer import Integer

DENSE = "bf16 linear"

# Bytes of copies of a weight. On the CPU no copy is used twice in a burst; on CUDA bursts are longer, to outweigh the
# launch, and the copies are to exceed the level-2 cache twice over.
_COPIED = {"cpu": 128 << 20, "cuda": 256 << 20}
_MOST_COPIES, _MOST_CALLS = 64, 1000


def copies(nbytes: int, device: torch.device) -> int:
    """How many copies of a weight of so many bytes to go over."""
    return max(2, min(math.ceil(_COPIED[device.type] / nbytes), _MOST_COPIES))


class Contender(Protocol):
    """One way to multiply by a weight [out, in], copies of it at hand.

    nbytes: bytes of one copy, as this one reads it. itemsize: bytes of an element of its x and y. longest: the most
    calls in a sample.
    """

    name: str
    nbytes: int
    copies: int
    itemsize: int
    longest: int
    about: dict[str, Any]

    def error(self, x: Tensor, expected: Tensor) -> float:
        """Relative RMS error of the product with x bfloat16 [rows, in]. Raises RuntimeError where there is none."""

    def seconds(self, x: Tensor, calls: int) -> float:
        """The time of one product, from `calls` of them, each with the next copy."""

    def close(self) -> None:
        """Give the memory back."""


class Entrant(Protocol):
    """What becomes a contender where it can serve a weight."""

    @property
    def name(self) -> str: ...

    def unsupported(self, qtensor: QTensor, device: torch.device) -> str | None:
        """Why it cannot take part; None if it can."""

    def enter(self, qtensor: QTensor) -> Contender:
        """Raises RuntimeError where it cannot after all."""


def entrants(kernels: list[str] | None = None, operators: bool = False) -> list[Entrant]:
    """torch's dense layer and the kernels of these names, by default all but the last resort.

    Args:
        operators: also those of torch's operators that no kernel uses.
    Raises:
        ValueError: an unknown name.
    """
    known = {kernel.name: kernel for kernel in registry()}
    names = [name for name, kernel in known.items() if not kernel.last_resort] if kernels is None else kernels
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"kernel {unknown[0]!r} is unknown; use one of {', '.join(known)}")
    chosen: list[Kernel] = [Dense(), *(known[name] for name in names)]
    if operators:
        chosen += [Fbgemm(), OneDNN()]
    return [InProcess(kernel) for kernel in chosen]


def own_kernels() -> set[str]:
    """The names of the registry's kernels but for those that only call another library's operator."""
    return {kernel.name for kernel in registry() if not kernel.only_calls_library}


@dataclass(frozen=True)
class InProcess:
    """A kernel as an entrant. Its inputs are bfloat16, or of its own `dtype`."""

    kernel: Kernel

    @property
    def name(self) -> str:
        return self.kernel.name

    @property
    def dtype(self) -> torch.dtype:
        return getattr(self.kernel, "dtype", torch.bfloat16)

    def unsupported(self, qtensor: QTensor, device: torch.device) -> str | None:
        return self.kernel.unsupported(qtensor, self.dtype, device)

    def enter(self, qtensor: QTensor) -> Contender:
        kind = OnCuda if qtensor.codes.is_cuda else Local
        return kind(self.kernel, qtensor, self.dtype)


class Local:
    """A kernel on the CPU, in this process."""

    def __init__(self, kernel: Kernel, qtensor: QTensor, dtype: torch.dtype):
        self.kernel, self.name, self.dtype = kernel, kernel.name, dtype
        self.about: dict[str, Any] = {}
        self.itemsize = dtype.itemsize
        first = kernel.pack(qtensor, dtype)
        self.nbytes = getattr(first, "nbytes", 0) or sum(buffer.nbytes for buffer in first.buffers())
        self.copies = copies(self.nbytes, qtensor.codes.device)
        self.longest = self.copies - 1  # the copy that wakes the threads is not used again
        # Each packed by itself, as a model's layers are: a copy of the tensors would lie in other kinds of pages.
        self.packed = [first, *(kernel.pack(qtensor, dtype) for _ in range(self.copies - 1))]
        self._turns = itertools.cycle(self.packed)

    def error(self, x: Tensor, expected: Tensor) -> float:
        product = self._linear(x.to(self.dtype)).to(torch.float32)
        if product.shape != expected.shape:
            raise RuntimeError(f"the product's shape is {list(product.shape)}, expected {list(expected.shape)}")
        return float((product - expected).norm() / expected.norm())

    def seconds(self, x: Tensor, calls: int) -> float:
        x = x.to(self.dtype)
        self._linear(x)  # wakes the threads
        start = time.perf_counter()
        for _ in range(calls):
            self._linear(x)
        return (time.perf_counter() - start) / calls

    def close(self) -> None:
        self.packed.clear()
        self._turns = itertools.cycle(self.packed)

    def _linear(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.kernel.linear(x, next(self._turns), None)


class OnCuda(Local):
    """A kernel on a GPU: CUDA graphs, and the GPU's own clock."""

    def __init__(self, kernel: Kernel, qtensor: QTensor, dtype: torch.dtype):
        super().__init__(kernel, qtensor, dtype)
        self.longest = _MOST_CALLS
        self.replays: dict[tuple[int, int], Callable[[], Any]] = {}

    def seconds(self, x: Tensor, calls: int) -> float:
        calls = math.ceil(calls / self.copies) * self.copies  # a graph goes over the same copies each time
        if (key := (len(x), calls)) not in self.replays:
            self.replays[key] = self._captured(x.to(self.dtype), calls)
            self.replays[key]()
        return cuda_seconds(self.replays[key]) / calls

    def close(self) -> None:
        self.replays.clear()
        super().close()
        torch.cuda.empty_cache()

    def _captured(self, x: Tensor, calls: int) -> Callable[[], Any]:
        """`calls` products as a graph, or one by one where the kernel cannot be captured; `about` says so."""

        def products() -> None:
            for _ in range(calls):
                self._linear(x)

        side, main = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):  # what is compiled, tuned or allocated once is done outside of the graph
            products()
        main.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                products()
        except RuntimeError as error:
            self.about["cuda graph"] = f"none: {str(error).partition(chr(10))[0]}"
            return products
        return graph.replay


def cuda_seconds(work: Callable[[], Any]) -> float:
    """What the GPU takes, by events around the work."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class Dense(Kernel):
    """The dequantized weight in bfloat16, by torch's linear layer: what quantizing is meant to beat."""

    rank: ClassVar[int] = 0
    name: ClassVar[str] = DENSE
    serves: ClassVar[tuple[Serves, ...]] = ()  # every scheme: the weight is dequantized before

    def unsupported(self, qtensor: QTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        return None

    def pack(self, qtensor: QTensor, dtype: torch.dtype) -> PackedWeight:
        return PackedWeight(qtensor, weight=qtensor.dequantize(torch.bfloat16))

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        return F.linear(x, packed.get_buffer("weight"), bias)


class TorchWeight(PackedWeight):
    """`handle` hides its bytes: one for a weight, four for a channel's scale."""

    handle: Any

    def __init__(self, qtensor: QTensor, handle: Any):
        super().__init__(qtensor)
        self.handle, self.nbytes = handle, (qtensor.shape[1] + 4) * qtensor.shape[0]


class TorchDynamic(Kernel):
    """PyTorch's dynamic INT8 linear layer on one of its engines: float32 in and out, one scale for all activations."""

    rank: ClassVar[int] = 0
    name: ClassVar[str]
    serves: ClassVar[tuple[Serves, ...]] = (Serves("int8-dynamic", Integer, (8,), Int8Token),)
    engine: ClassVar[str]
    dtype: ClassVar[torch.dtype] = torch.float32
    input_bits: ClassVar[tuple[int, int] | None] = (8, 8)

    def unsupported(self, qtensor: QTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        if reason := self.unserved(qtensor.scheme):
            return reason
        if device.type != "cpu":
            return f"runs on CPUs, not on {device.type}"
        known = torch.backends.quantized.supported_engines
        return None if self.engine in known else f"this PyTorch has the engines {', '.join(known)} only"

    def pack(self, qtensor: QTensor, dtype: torch.dtype) -> PackedWeight:
        codes = (unpack(qtensor.codes, 8, qtensor.shape[1]) ^ 128).view(torch.int8)
        scales = qtensor.scales.flatten().to(torch.float64)
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = self.engine
        try:
            with warnings.catch_warnings():  # quantized tensors are deprecated, and all that linear_prepack reads
                warnings.simplefilter("ignore")
                whole = torch._make_per_channel_quantized_tensor(codes, scales, torch.zeros_like(scales).long(), 0)
                return TorchWeight(qtensor, torch.ops.quantized.linear_prepack(whole, None))
        finally:
            torch.backends.quantized.engine = before

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        assert isinstance(packed, TorchWeight)
        return torch.ops.quantized.linear_dynamic(x, packed.handle, True)  # as torch.ao's layer calls it


class Fbgemm(TorchDynamic):
    name, engine = "torch fbgemm", "fbgemm"


class OneDNN(TorchDynamic):
    name, engine = "torch onednn", "onednn"
