"""The native kernels on 64-bit ARM, by an emulator: each of its sets of instructions against float64.

Needs aarch64-linux-gnu-gcc and qemu-aarch64-static (on Debian: gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and
qemu-user-static). Weights are packed by this machine's own library: the packed form is the same everywhere.
"""

import itertools
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitpress.kernels.cpu import library as native_library
from bitpress.kernels.cpu.native import DTYPES, INT8, INT16, NativeExact, NativeInt8, NativeInt16, NativeMixed
from bitpress.kernels.qtensor import QTensor

from .test_native import CASES, CPU, bound, found_library, relative, rounded

Make = Callable[..., QTensor]

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64-static"
SETS = ("neon-i8mm", "neon-dotprod", "portable")
ROWS = (1, 2, 3, 4, 5, 8, 11)

pytestmark = pytest.mark.skipif(not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason="no emulator of ARM")


class Machine:
    """The library, built for ARM, in a process of the emulator. `cpu`: which one is emulated."""

    def __init__(self, program: Path, cpu: str):
        self.process = subprocess.Popen([EMULATOR, "-cpu", cpu, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        names = bytes(self.call(0, 0, 0, 0, 0, b"", b"", 32 * 8)).split(b"\0")
        self.sets = [name.decode() for name in names if name]

    def call(
        self, function: int, instructions: int, rows: int, dtype: int, inputs: int, weight: bytes, x: bytes, size: int
    ) -> bytearray:
        """What arm_driver.c answers."""
        assert self.process.stdin
        assert self.process.stdout
        numbers = (function, instructions, rows, dtype, inputs, len(weight), len(x), size)
        self.process.stdin.write(struct.pack("<8q", *numbers) + weight + x)
        self.process.stdin.flush()
        (status,) = struct.unpack("<q", self.process.stdout.read(8))
        assert status == 0
        return bytearray(self.process.stdout.read(size))

    def linear(self, instructions: str, kernel: NativeInt8, q: QTensor, x: Tensor) -> Tensor:
        """float32 x [rows, in] times the weight, by a set of instructions."""
        packed, size = kernel.pack(q, torch.float32).get_buffer("data"), 4 * len(x) * q.shape[0]
        place = self.sets.index(instructions)
        y = self.call(1, place, len(x), DTYPES[x.dtype], kernel.inputs, as_bytes(packed), as_bytes(x), size)
        return torch.frombuffer(y, dtype=torch.float32).view(len(x), -1)


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found_library()
    csrc = Path(native_library.__file__).parent / "csrc"
    path = tmp_path_factory.mktemp("arm") / "driver"
    sources = [*sorted(csrc.glob("*.c")), Path(__file__).with_name("arm_driver.c")]
    flags = [flag for flag in native_library._FLAGS if flag != "-fPIC"]
    command = [COMPILER, *flags, "-Wall", "-Wextra", "-Werror", "-static", "-o", path, *sources, "-lm", "-lpthread"]
    subprocess.run(command, check=True)
    return path


@pytest.fixture(scope="module")
def machine(program: Path) -> Iterator[Machine]:
    machine = Machine(program, "max")
    yield machine
    machine.process.kill()


@pytest.mark.parametrize(("cpu", "sets"), [("max", SETS), ("neoverse-n1", SETS[1:]), ("cortex-a72", SETS[2:])])
def test_sets_of_a_machine(program: Path, cpu: str, sets: tuple[str, ...]) -> None:
    machine = Machine(program, cpu)
    machine.process.kill()
    assert machine.sets == list(sets)


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize(("scheme", "shape"), CASES)
def test_products(
    make_qtensor: Make, generator: torch.Generator, machine: Machine, instructions: str, scheme: str, shape: tuple
) -> None:
    """As test_native.py has it."""
    q = make_qtensor(scheme, *shape, torch.float16) if scheme.startswith("int") else make_qtensor(scheme, *shape)
    weight = q.dequantize().double()
    for kernel, rows in itertools.product((NativeInt8(), NativeMixed(), NativeInt16(), NativeExact()), ROWS):
        if kernel.unsupported(q, torch.float32, CPU) or (instructions == "portable" and rows not in (1, 3)):
            continue
        x = torch.randn(rows, shape[1], generator=generator)
        if q.scheme.weight.description().type != "codebook":  # one large term would show its code's rounding
            x[::3, 5::41] *= 40
        inputs = x.double() if kernel.input_bits is None else rounded(x, q, kernel.input_bits)
        y = machine.linear(instructions, kernel, q, x)
        assert relative(y, inputs, weight) <= bound(kernel, q), (kernel.name, rows)


@pytest.mark.parametrize("kernel", [NativeInt8(), NativeInt16()])
def test_sets_agree_on_integers(
    make_qtensor: Make, generator: torch.Generator, machine: Machine, kernel: NativeInt8
) -> None:
    """One scale a row: sums of integers are exact, so that every set of instructions gives the same bits."""
    q = make_qtensor("int8-channel-asym", 47, 128)
    x = torch.randn(7, 128, generator=generator) * torch.logspace(-3, 3, 128)
    first, *others = (machine.linear(instructions, kernel, q, x) for instructions in SETS)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("inputs", [INT8, INT16])
def test_nan_stays_in_its_row(make_qtensor: Make, machine: Machine, inputs: int) -> None:
    q = make_qtensor("int4-g32", 40, 96)
    x = torch.ones(5, 96)
    x[1, 5] = torch.nan
    kernel = NativeInt8() if inputs == INT8 else NativeInt16()
    for instructions in SETS:
        y = machine.linear(instructions, kernel, q, x)
        assert y[1].isnan().all()
        assert y[[0, 2, 3, 4]].isfinite().all()


@pytest.mark.parametrize("scheme", ["int3-g64", "int8-g128-asym", "nf4", "nvfp4", "fp8"])
def test_dequantized(make_qtensor: Make, machine: Machine, scheme: str) -> None:
    q = make_qtensor(scheme, 33, 384)
    packed, size = NativeInt8().pack(q, torch.float32).get_buffer("data"), 4 * 33 * 384
    values = machine.call(2, 0, 33, DTYPES[torch.float32], 0, as_bytes(packed), b"", size)
    found = torch.frombuffer(values, dtype=torch.float32).view(33, 384)
    torch.testing.assert_close(found, q.dequantize(), rtol=2.0**-11, atol=0)


def test_a_dense_weight_of_few_rows(generator: torch.Generator, machine: Machine) -> None:
    weight, x = (torch.randn(rows, 80, generator=generator) for rows in (37, 3))
    y = machine.call(3, 0, 3, DTYPES[torch.float32], 0, as_bytes(weight), as_bytes(x), 4 * 3 * 37)
    expected = x.double() @ weight.double().t()
    torch.testing.assert_close(
        torch.frombuffer(y, dtype=torch.float32).view(3, 37).double(), expected, rtol=1e-5, atol=1e-5
    )
