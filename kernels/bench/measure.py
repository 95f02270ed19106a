"""Kernels against each other, torch's own linear layer and the memory, all in one run.

Contenders take turns, one sample each per round, so that a machine that slows down slows them all. A sample is a burst
of products, each with another copy of the weight, and every round reads more memory than the caches hold: a model, too,
comes back to a weight only after all its others. A product that is wrong is shown as wrong, and not timed.
"""

import contextlib
import itertools
import math
import mmap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cpu.native import touch
from ..qtensor import QTensor
from ..scheme import Scheme
from .entrants import Contender, Entrant, cuda_seconds

# Relative RMS. Rounding activations to 8 bits costs 0.5 to 1%, to 7 bits, as torch's dynamic INT8 does, twice that.
TOLERANCE = 2.0**-5

_BURST = 0.01  # seconds that a sample is to last: waking threads and reading clocks drown in it
_UNKNOWN_CACHE = 64 << 20  # bytes, where the system does not tell
_CUDA_BUFFER = 1 << 30
_FLAGS = ("avx", "amx", "fma", "f16c", "asimd", "sve", "i8mm")  # of a CPU, the beginnings of what kernels look for


@dataclass(frozen=True)
class Job:
    """What to multiply: weights of these schemes and shapes [out, in] by these numbers of rows; rounds: of samples."""

    device: torch.device
    schemes: tuple[Scheme, ...]
    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    rounds: int


@dataclass
class Result:
    """What was measured of one contender.

    nbytes: bytes of the weight as it is read; moved: with x and y. error: relative RMS. problem: why it was not timed.
    samples: seconds per product, one from each round's burst of `calls`. about: versions and such."""

    name: str
    nbytes: int
    moved: int
    copies: int
    about: dict[str, Any] = field(default_factory=dict)
    calls: int = 1
    error: float | None = None
    problem: str | None = None
    samples: list[float] = field(default_factory=list)

    def seconds(self, quantile: float = 0.5) -> float:
        return torch.tensor(self.samples, dtype=torch.float64).quantile(quantile).item()

    @property
    def bytes_per_second(self) -> float:
        return self.moved / self.seconds()


@dataclass
class Cell:
    """One scheme, shape [out, in] and number of rows. memory: the bandwidth, measured in the same rounds. absent:
    who did not take part, and why."""

    scheme: str
    shape: tuple[int, int]
    rows: int
    memory: Result
    results: list[Result]
    absent: dict[str, str]

    def share(self, result: Result) -> float:
        """The part of the memory's bandwidth that a contender reached."""
        return result.bytes_per_second / self.memory.bytes_per_second

    def gops(self, result: Result) -> float:
        """10^9 multiplications and additions per second."""
        return 2 * self.rows * self.shape[0] * self.shape[1] / result.seconds() / 1e9

    def ratio(self, result: Result, name: str) -> float | None:
        """How many times as fast as the contender of that name; None where either was not timed."""
        other = next((each for each in self.results if each.name == name and each.samples), None)
        return other.seconds() / result.seconds() if other and result.samples else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(everyone: list[Entrant], job: Job, news: Callable[[str], None]) -> Iterator[Cell]:
    """Every scheme, shape and number of rows in turn, each with all who can take part."""
    memory = Memory(job.device)
    for scheme, shape in itertools.product(job.schemes, job.shapes):
        qtensor = random_weight(scheme, shape, job.device)
        with ExitStack() as stack:
            contenders: list[Contender] = [memory]
            absent: dict[str, str] = {}
            news(f"{scheme.name}, {shape[0]} x {shape[1]}: preparing")
            for entrant in everyone:
                try:
                    if reason := entrant.unsupported(qtensor, job.device):
                        absent[entrant.name] = reason
                        continue
                    contenders.append(entrant.enter(qtensor))
                    stack.callback(contenders[-1].close)
                except RuntimeError as error:
                    absent[entrant.name] = str(error)
            weight = qtensor.dequantize()
            for rows in job.rows:
                news(f"{scheme.name}, {shape[0]} x {shape[1]}: {rows} row{'s' if rows > 1 else ''}")
                x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows)).to(weight.device)
                results = compare(contenders, x.to(torch.bfloat16), weight, job.rounds)
                yield Cell(scheme.name, shape, rows, results[0], results[1:], absent)


def compare(contenders: list[Contender], x: Tensor, weight: Tensor, rounds: int) -> list[Result]:
    """Each contender's product checked once, then sampled once in each round.

    Args:
        x: bfloat16 [rows, in]. weight: float32 [out, in], what all contenders' stand for.
    """
    expected = x.to(torch.float32) @ weight.t()
    results = [_admit(contender, x, expected) for contender in contenders]
    for _ in range(rounds):
        for contender, result in zip(contenders, results):
            if not result.problem:
                settle()
                result.samples.append(contender.seconds(x, result.calls))
    return results


def _admit(contender: Contender, x: Tensor, expected: Tensor) -> Result:
    moved = contender.nbytes + (x.numel() + expected.numel()) * contender.itemsize
    result = Result(contender.name, contender.nbytes, moved, contender.copies, contender.about)
    try:
        error = contender.error(x, expected)
        result.error = error if math.isfinite(error) else None
        if not error <= TOLERANCE:
            result.problem = f"wrong: relative RMS error {error:.2g}, at most {TOLERANCE:.2g} is put down to rounding"
        else:
            once = min(contender.seconds(x, 1) for _ in range(2))
            result.calls = max(1, min(math.ceil(_BURST / once), contender.longest))
    except RuntimeError as error:
        result.problem = f"failed: {error}"
    return result


def settle() -> None:
    """Wait until this process is idle: OpenMP's threads go on in a busy loop for some milliseconds after their work,
    on the cores that the next contender's threads need."""
    for _ in range(500):
        before = time.process_time()
        time.sleep(0.002)
        if time.process_time() - before < 0.0005:
            return


class Memory:
    """Reads (on CUDA: copies) more than the caches hold. It measures the bandwidth, and no weight is left in them."""

    def __init__(self, device: torch.device):
        self.name, self.copies, self.itemsize, self.longest = "memory", 1, 0, 1
        cache = cache_bytes(device)
        self.buffer = _on_cuda(device) if device.type == "cuda" else _in_huge_pages(2 * (cache or _UNKNOWN_CACHE))
        self.about: dict[str, Any] = {"cache_bytes": cache}
        self.about["exceeds_cache"] = self.buffer.nbytes > (cache or _UNKNOWN_CACHE)
        self.nbytes = self.buffer.nbytes
        if device.type == "cuda":
            self.twin = torch.empty_like(self.buffer)
            self.nbytes, self.about["by"] = 2 * self.nbytes, "device-to-device copy"
        else:
            self.about["by"], self.read = min(readers().items(), key=self._reading_seconds)

    def error(self, x: Tensor, expected: Tensor) -> float:
        return 0.0

    def seconds(self, x: Tensor, calls: int) -> float:
        if self.buffer.is_cuda:
            return cuda_seconds(lambda: self.twin.copy_(self.buffer))
        return self._reading_seconds((self.name, self.read))

    def close(self) -> None:
        """It serves every weight."""

    def _reading_seconds(self, reader: tuple[str, Callable[[Tensor], Any]]) -> float:
        start = time.perf_counter()
        reader[1](self.buffer)
        return time.perf_counter() - start


def readers() -> dict[str, Callable[[Tensor], Any]]:
    """What reads a tensor on the CPU with all of torch's threads; which is the fastest differs between machines."""
    known: dict[str, Callable[[Tensor], Any]] = {"torch's amax": Tensor.amax}
    with contextlib.suppress(RuntimeError):  # there is no native library here
        touch(torch.ones(64, dtype=torch.int32))
        known["the native library"] = touch
    return known


def _on_cuda(device: torch.device) -> Tensor:
    return torch.ones(_CUDA_BUFFER // 4, dtype=torch.int32, device=device)


def _in_huge_pages(nbytes: int) -> Tensor:
    """int32 of so many bytes, but at most of a quarter of the free memory, in huge pages where the system has them:
    the bandwidth is to be what a kernel can have at best."""
    size = max(4, min(nbytes, _free_bytes() // 4) // 4 * 4)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.int32).fill_(1)


def random_weight(scheme: Scheme, shape: tuple[int, int], device: torch.device) -> QTensor:
    """Random codes, scales and zero points, always the same: for speed, all weights are alike."""
    tensors = scheme.random(shape, torch.Generator().manual_seed(0))
    return QTensor.of(scheme, shape, tensors).to(device)


def cache_bytes(device: torch.device) -> int | None:
    """Bytes of all the caches of the last level before the memory; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    levels: dict[int, dict[str, int]] = {}
    units = {"K": 1 << 10, "M": 1 << 20}
    for size in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*/size"):
        level, shared = ((size.parent / name).read_text().strip() for name in ("level", "shared_cpu_list"))
        text = size.read_text().strip()
        if text[-1:] in units:
            levels.setdefault(int(level), {})[shared] = int(text[:-1]) * units[text[-1]]
    return sum(levels[max(levels)].values()) if levels else None


def _free_bytes() -> int:
    """Memory that can be had; where the system does not tell, what any machine with a model on it has."""
    info = Path("/proc/meminfo")
    lines = dict(line.split(":") for line in info.read_text().splitlines()) if info.exists() else {}
    return int(lines["MemAvailable"].split()[0]) << 10 if "MemAvailable" in lines else 1 << 30


def cpu_flags() -> list[str]:
    """The CPU's instruction sets, of those that kernels look for; [] where the system does not tell."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return sorted(flag for flag in flags if flag.startswith(_FLAGS))
