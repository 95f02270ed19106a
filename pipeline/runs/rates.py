"""How fast a machine does the parts of a job: measured in ten seconds, or stated figures of a machine that is named."""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bitpress.eval.measure import speed
from bitpress.kernels.products import product

from ..quantize.spec import LayerSpec
from ..storage import files
from ..system import children
from ..system.machine import machine

Shape = tuple[int, int]
_SECONDS = 0.7  # for each measurement; with one for each kind of layer, about ten in all
_TOKENS = 512  # that a sample of inputs has
_MOST = (512, 2048)  # [out, in] of the layers that are rounded; more rows and columns take longer in proportion
_BYTES = 32 << 20  # that are written, read and hashed


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    machine: which one, in words. products: floating-point operations in products of matrices, in the dtype of most
    models. statistics: of a calibrated method, multiplications of inputs by inputs. read: bytes read and hashed.
    write: bytes written, synced and hashed. memory: bytes from memory. start: seconds, not a rate, until a fresh
    process can work. rounding: a layer's spec, by name -> weights per second; others go by `calibrated`, for methods
    with statistics, and `plain`.
    """

    machine: str
    products: float
    statistics: float
    read: float
    write: float
    memory: float
    start: float
    plain: float
    calibrated: float
    rounding: Mapping[str, float] = field(default_factory=dict)

    def weights_per_second(self, spec: LayerSpec) -> float:
        """How many weights of a spec are rounded in a second."""
        return self.rounding.get(spec.name, self.calibrated if spec.method.statistics else self.plain)


# Round figures by estimate, within a factor of two or three of such a machine; `--measure` takes this one's own.
STATED = Rates(
    "stated figures of 2 cores of an Intel Xeon with AMX, bfloat16",
    products=8e11,
    statistics=4e10,
    read=8e8,
    write=4e8,
    memory=1.5e10,
    start=4.0,
    plain=4e7,
    calibrated=1.5e6,
)


def measure(layers: Sequence[tuple[LayerSpec, Shape]], dtype: torch.dtype, device: torch.device, folder: Path) -> Rates:
    """The rates of this machine, measured in about ten seconds.

    Args:
        layers: every spec that is planned, with the shape [out, in] of a large layer of it.
        dtype: of the model. device: where models run.
        folder: on the disk that the run is written to; a file of 32 MB lies there for a moment.
    """
    generator = torch.Generator().manual_seed(0)
    rounding: dict[str, float] = {}
    gathered: list[float] = []
    for spec, shape in layers:
        if spec.name in rounding:
            continue
        out, columns = min(shape[0], _MOST[0]), min(shape[1], _MOST[1])
        fitted = spec.fitted((out, columns))
        weight = torch.randn(out, columns, generator=generator).to(dtype)
        inputs = torch.randn(_TOKENS, columns, generator=generator).to(dtype)
        statistics = []
        for kind in spec.method.statistics:
            statistic = kind(columns, torch.device("cpu"))
            gathered.append(_TOKENS * columns**2 / _seconds(lambda s=statistic, i=inputs: s.add(i)))  # type: ignore[misc]
            statistics.append(statistic)
        start = time.perf_counter()
        spec.method.quantize(weight, fitted.scheme, torch.float16, tuple(statistics))
        rounding[spec.name] = weight.numel() / (time.perf_counter() - start)
    side = 2048 if device.type == "cuda" else 1024
    matrix = torch.randn(side, side, generator=generator).to(device, dtype)
    described = machine(device)
    plain = [rounding[spec.name] for spec, _ in layers if not spec.method.statistics]
    calibrated = [rounding[spec.name] for spec, _ in layers if spec.method.statistics]
    write, read = _disk(folder)
    return Rates(
        f"measured here: {described['cpu']}, {described['threads']} threads"
        + (f", {described['device']}" if device.type == "cuda" else ""),
        products=2 * side**3 / _seconds(lambda: _product(matrix)),
        statistics=min(gathered, default=STATED.statistics),
        read=read,
        write=write,
        memory=speed.bandwidth(device),
        start=_start(),
        plain=min(plain, default=STATED.plain),
        calibrated=min(calibrated, default=STATED.calibrated),
        rounding=rounding,
    )


def _seconds(work: Callable[[], object]) -> float:
    """What one call takes: the median of as many as fit into _SECONDS, the first left out."""
    work()
    times: list[float] = []
    end = time.perf_counter() + _SECONDS
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _product(matrix: torch.Tensor) -> None:
    product(matrix, matrix)
    if matrix.is_cuda:
        torch.cuda.synchronize()


def _disk(folder: Path) -> tuple[float, float]:
    """Bytes per second written and synced, and read and hashed, in the first folder above that there is."""
    disk = files.nearest_folder(folder)
    with files.disk_errors(disk), tempfile.TemporaryDirectory(dir=disk, prefix=".bitpress-") as temporary:
        path = Path(temporary) / "sample"
        start = time.perf_counter()
        files.write_file(path, [os.urandom(_BYTES)])
        written = time.perf_counter()
        files.sha256_file(path)
        return _BYTES / (written - start), _BYTES / (time.perf_counter() - written)


def _start() -> float:
    """Seconds until a fresh process has imported what an evaluation needs."""
    command = [sys.executable, "-c", "import bitpress.pipeline.evaluate.measure"]
    start = time.perf_counter()
    with children.private_folder() as private, children.start(command, private) as process:
        process.wait()
    return time.perf_counter() - start
