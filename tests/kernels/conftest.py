"""Fixtures for the kernels: random quantized weights, memory that starts as NaN, and Triton without a GPU."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpress.kernels.packing import pack
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme
from bitpress.kernels.weights.nf4 import NESTED_BLOCK, NF4_BLOCK, NestedScales


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """The matrices are small: more threads only wait for each other."""
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(was)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def make_qtensor(generator: torch.Generator) -> Callable[..., QTensor]:
    """make_qtensor("int4-g128", 64, 256): random codes, scales and zero points; weights of the order of 1."""

    def randint(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, dtype=torch.uint8, generator=generator)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) + 0.5

    def make(name: str, out_features: int, in_features: int, scale_dtype: torch.dtype = torch.float32) -> QTensor:
        scheme, shape = Scheme.parse(name), (out_features, in_features)
        if scheme.weight.description().type == "float":
            return QTensor.of(scheme, shape, scheme.random(shape, generator))
        if scheme.weight.description().type == "codebook":
            blocks = -(-out_features * in_features // NF4_BLOCK)
            codes = randint(256, -(-out_features * in_features // 2))
            if not scheme.weight.double_quant:
                return QTensor(scheme, shape, codes, rand(blocks))
            codebook = torch.linspace(-1, 1, 256)
            nested = NestedScales(rand(-(-blocks // NESTED_BLOCK)), codebook, torch.tensor(2.0))
            return QTensor(scheme, shape, codes, randint(256, blocks), extra=nested.tensors())
        groups, levels = scheme.groups(in_features), 1 << scheme.bits
        codes = pack(randint(levels, out_features, in_features), scheme.bits)
        scales = (rand(out_features, groups) * 2 / levels).to(scale_dtype)
        zeros = None if scheme.symmetric else randint(levels, out_features, groups)
        return QTensor(
            scheme, shape, codes, scales, zeros, extra=scheme.static.random(generator) if scheme.static else {}
        )

    return make


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """torch.empty and its kin fill floating memory with NaN and integers with their largest value."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(was)


@pytest.fixture
def nan_stays_in_its_row() -> Callable[..., None]:
    """nan_stays_in_its_row(kernel, qtensor): of few rows and of many; no output shows the input of another row."""

    def check(kernel: Any, qtensor: QTensor) -> None:
        packed = kernel.pack(qtensor, torch.bfloat16)
        for rows in (3, 65):
            x = torch.ones(rows, qtensor.shape[1], dtype=torch.bfloat16, device=qtensor.codes.device)
            x[1, 5] = torch.nan
            y = kernel.linear(x, packed, None)
            assert y[1].isnan().all()
            assert y[2:].isfinite().all()

    return check


@dataclass(frozen=True)
class Cubin:
    """A Triton program as NVIDIA's disassembler shows it. shared: bytes of a block's; stack: bytes of a thread's, which
    hold what did not fit into its registers."""

    registers: int
    stack: int
    shared: int
    sass: str

    def count(self, instruction: str) -> int:
        """How often an instruction occurs whose name begins so: "LDG.E.128", "HGMMA", …"""
        return len(
            re.findall(rf"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?{re.escape(instruction)}", self.sass, re.MULTILINE)
        )


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Cubin]:
    """compiled(kernel, {"x_at": "*bf16", "rows": "i32"}, {"BLOCK": 64}, 90, num_warps=4): the program for compute
    capability 9.0, with the kinds of its arguments and the constants in their place. The compiler needs no GPU.

    Pointers are taken to be multiples of 16, and integers too but for those named in `odd`, as Triton does with what
    it is given.
    """
    triton = pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))

    def show(what: str, path: Path) -> str:
        cuobjdump = triton.knobs.nvidia.cuobjdump.path
        return subprocess.run([cuobjdump, what, path], capture_output=True, text=True, check=True).stdout

    def compile(
        kernel: Any, kinds: dict[str, str], constants: dict[str, Any], capability: int, odd: tuple = (), **options: int
    ) -> Cubin:
        target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
        signature = {name: kinds.get(name, "constexpr") for name in kernel.arg_names}
        missing = [name for name in kernel.arg_names if name not in kinds and name not in constants]
        assert not missing, missing
        aligned = {
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(kernel.arg_names)
            if name in kinds and name not in odd and (kinds[name][0] == "*" or kinds[name].startswith("i"))
        }
        source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
        program = triton.compile(source, target=target, options=options)
        path = tmp_path / "program.cubin"
        path.write_bytes(program.asm["cubin"])
        usage = dict(re.findall(r"(\w+):(\d+)", show("--dump-resource-usage", path)))
        return Cubin(int(usage["REG"]), int(usage["STACK"]), program.metadata.shared, show("--dump-sass", path))

    return compile


@pytest.fixture
def interpreted() -> Callable[[str], int]:
    """interpreted(__file__): how many tests of the file pass in Triton's interpreter, on the CPU. In a process of its
    own, for Triton looks at the variable when it is imported; without the fixtures of the folders above, which import
    much."""
    pytest.importorskip("triton")

    def run(file: str) -> int:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            f"--confcutdir={Path(__file__).parent}",
            file,
        ]
        variables = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        root = Path(__file__).parents[2]
        outcome = subprocess.run(command, env=variables, cwd=root, capture_output=True, text=True, check=False)
        assert outcome.returncode == 0, outcome.stdout + outcome.stderr
        found = re.search(r"(\d+) passed", outcome.stdout)
        return int(found[1]) if found else 0

    return run
