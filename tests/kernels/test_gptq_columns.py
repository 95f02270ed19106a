"""GPTQ's loop over columns against its formulas: in C on a CPU, as a Triton program on a GPU and in its interpreter."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bitpress.kernels.cpu import gptq_columns as native_columns
from bitpress.kernels.cpu.library import Library, library
from bitpress.kernels.packing import unpack
from bitpress.kernels.scheme import Scheme
from bitpress.kernels.triton import gptq_columns as triton_columns
from bitpress.kernels.triton.gptq_columns import MAX_COLUMNS
from bitpress.pipeline.methods.gptq import GPTQ
from bitpress.pipeline.methods.hessian import Hessian

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_CUDA = not INTERPRETED and torch.cuda.is_available() and triton_columns.problem(torch.device("cuda")) is None
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
TRITON = triton_columns.triton is not None
LOOP: Any = triton_columns if INTERPRETED or ON_CUDA else native_columns

runs = pytest.mark.skipif(LOOP is native_columns and isinstance(library(), str), reason="no native library")
needs_triton = pytest.mark.skipif(
    not TRITON or INTERPRETED, reason="Triton is not installed; there is none but on Linux"
)
GROUPS = 3
SHAPES = [
    (1, 1),
    (1, 17),
    (7, 1),
    (15, 16),
    (16, 13),
    (17, 33),
    (127, 13),
    (MAX_COLUMNS, 15),
    (33, 150),
]  # columns, rows
EVERY = pytest.mark.parametrize(("columns", "rows"), SHAPES)
EPSILON = 2.0**-23


def random_normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def guarded(values: Tensor | None, *shape: int, at: int = 64) -> tuple[Tensor, Tensor]:
    """On DEVICE: a contiguous tensor, and the memory it lies in, which is NaN all around it, and in it without values.

    at: where it begins; not every tensor is aligned.
    """
    memory = torch.full((2 * 64 + torch.Size(shape).numel(),), float("nan"), device=DEVICE)
    inside = memory[at : at + torch.Size(shape).numel()].view(shape)
    if values is not None:
        inside.copy_(values)
    return inside, memory


def check_guards(inside: Tensor, memory: Tensor) -> None:
    assert not inside.isnan().any()
    assert memory.isnan().sum() == 2 * 64


def within_nan(matrix: Tensor) -> Tensor:
    """On DEVICE: the matrix as a block of a larger one that is NaN elsewhere."""
    size = len(matrix)
    large = torch.full((size + 3, size + 5), float("nan"), device=DEVICE)
    large[2 : 2 + size, 1 : 1 + size] = matrix
    return large[2 : 2 + size, 1 : 1 + size]


def problem_of(columns: int, rows: int, symmetric: bool) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor]:
    """A positive definite matrix [columns, columns]; scales and 4-bit limits [GROUPS, rows], of which some allow
    nothing but 0; each column's group."""
    inputs = random_normal(2 * columns, columns) + random_normal(2 * columns, 1)
    matrix = inputs.t() @ inputs / len(inputs) + 0.05 * torch.eye(columns)
    generator = torch.Generator().manual_seed(columns * rows)
    scale = torch.rand(GROUPS, rows, generator=generator) * 0.2 + 0.2
    low = torch.full_like(scale, -8)
    if not symmetric:
        low = -torch.randint(0, 16, (GROUPS, rows), generator=generator).to(torch.float32)
    pinned = torch.rand(GROUPS, rows, generator=generator) < 0.1
    grid = (scale.masked_fill(pinned, 1), low.masked_fill(pinned, 0), (low + 15).masked_fill(pinned, 0))
    return matrix, grid, torch.randint(0, GROUPS, (columns,), dtype=torch.int32, generator=generator)


def run_guarded(
    function: Callable[..., None], values: Tensor, start: Tensor | None, factor: Tensor, grid: Any, groups: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The columns as they were at their turns, codes and steps, [columns, rows] on the CPU, where all lies amid NaN.

    Args:
        start: the codes before; None where there are none.
    """
    shape = values.shape
    pairs = guarded(values, *shape, at=61), guarded(start, *shape, at=62), guarded(None, *shape, at=63)
    tables = tuple(guarded(table, *table.shape)[0] for table in grid)
    left, codes, steps = (inside for inside, _ in pairs)
    function(left, within_nan(factor), tables, groups.to(DEVICE), codes, steps)
    for pair in pairs:
        check_guards(*pair)
    return left.cpu(), codes.cpu(), steps.cpu()


def compensated(start: Tensor, factor: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """What each column should have been at its turn, float64, given the steps that were taken before; and how far off
    it may be: each of the sums before it rounds once, its product too where it is not fused."""
    start, factor, steps = start.double(), factor.double().triu(1), steps.double()
    expected = start - factor.t() @ steps
    most = start.abs() + factor.abs().t() @ steps.abs()
    return expected, EPSILON * len(start) * most


@runs
@pytest.mark.parametrize("symmetric", [True, False])
@EVERY
def test_rounding(columns: int, rows: int, symmetric: bool):
    """Column by column, with the errors as the program made them: so no tie, decided otherwise, counts twice."""
    matrix, grid, groups = problem_of(columns, rows, symmetric)
    upper = torch.linalg.cholesky(torch.linalg.inv(matrix.double()), upper=True).float()
    weight = random_normal(columns, rows)
    left, codes, errors = run_guarded(LOOP.round_columns, weight, None, upper, grid, groups)
    expected, tolerance = compensated(weight, upper, errors)
    assert ((left - expected).abs() <= tolerance).all()
    scale, low, high = (table[groups.long()] for table in grid)
    assert torch.equal(codes, (left / scale).round().clamp(low, high))
    pivots = upper.diagonal().unsqueeze(1)
    exact = (left.double() - codes.double() * scale) / pivots
    assert ((errors - exact).abs() <= EPSILON * ((left.abs() + (codes * scale).abs()) / pivots + exact.abs())).all()


@runs
@pytest.mark.parametrize("symmetric", [True, False])
@EVERY
def test_settling(columns: int, rows: int, symmetric: bool):
    inner, grid, groups = problem_of(columns, rows, symmetric)
    scale, low, high = (table[groups.long()] for table in grid)
    start = (3 * random_normal(columns, rows)).round().clamp(low, high)
    gradient = 0.3 * random_normal(columns, rows)
    slope, codes, changes = run_guarded(LOOP.settle_columns, gradient, start, inner, grid, groups)
    expected, tolerance = compensated(gradient, inner, changes)
    assert ((slope - expected).abs() <= tolerance).all()
    ideal = start + slope * (1 / inner.diagonal().unsqueeze(1)) / scale
    assert torch.equal(codes, ideal.round().clamp(low, high))
    assert torch.equal(changes, (codes - start) * scale)


@runs
def test_ties_go_to_the_even_code():
    """Multiples of 1/2, and whole factors and scales: nothing is rounded but the codes, so all is as in float64, to the
    bit. A product with 1 / scale would miss some ties."""
    columns, rows, generator = 64, 37, torch.Generator().manual_seed(0)
    sparse = torch.rand(columns, columns, generator=generator) < 0.05
    upper = (torch.randint(-1, 2, (columns, columns), generator=generator) * sparse).triu(1) + torch.eye(columns)
    scale = 2.0 * torch.randint(0, 30, (GROUPS, rows), generator=generator) + 1
    grid = (scale, torch.full_like(scale, -1000), torch.full_like(scale, 1000))
    groups = torch.randint(0, GROUPS, (columns,), dtype=torch.int32, generator=generator)
    weight = (torch.randint(-20, 20, (columns, rows), generator=generator) + 0.5) * scale[groups.long()]
    left = weight.to(DEVICE, copy=True)
    codes, errors = torch.full_like(left, float("nan")), torch.full_like(left, float("nan"))
    tables = tuple(table.to(DEVICE) for table in grid)
    LOOP.round_columns(left, upper.to(DEVICE), tables, groups.to(DEVICE), codes, errors)
    wide, ties = weight.double(), 0
    for j, group in enumerate(groups.tolist()):
        ideal = wide[j] / scale[group]
        ties += int(((ideal - ideal.floor()) == 0.5).sum())
        assert torch.equal(codes[j].cpu().double(), ideal.round())
        error = wide[j] - ideal.round() * scale[group]
        assert torch.equal(errors[j].cpu().double(), error)
        wide[j + 1 :] -= upper[j, j + 1 :].double().unsqueeze(1) * error
    assert torch.equal(left.cpu().double(), wide)
    assert ties > columns * rows / 5


@runs
@pytest.mark.parametrize("name", ["int4-g16-asym", "int3-channel"])
def test_gptq_finds_what_it_finds_without(name: str, monkeypatch: pytest.MonkeyPatch):
    columns = MAX_COLUMNS + 16
    hessian = Hessian(columns, DEVICE)
    hessian.add((random_normal(400, columns) + random_normal(400, 1)).to(DEVICE))
    weight = random_normal(5, columns).to(DEVICE)
    weight[1, 16:32] = 0
    found = []
    for chosen in (LOOP, None):
        for each in (triton_columns, native_columns):
            monkeypatch.setattr(each, "problem", lambda device, own=each is chosen: None if own else "not this time")
        qtensor, diagnostics = GPTQ().quantize(weight, Scheme.parse(name), torch.float16, (hessian,))
        codes = unpack(qtensor.codes, qtensor.scheme.bits, columns)
        found.append((codes, diagnostics.output_error))
    (codes, error), (expected, by_torch) = found
    # One tie decided otherwise changes the codes after it, in its row; there is seldom one among so few.
    assert (codes == expected).all(1).sum() >= 4
    assert error == pytest.approx(by_torch, rel=0.02)


@pytest.mark.skipif(LOOP is not native_columns or isinstance(library(), str), reason="no native library, or Triton")
@pytest.mark.parametrize("settle", [False, True])
def test_all_instruction_sets_give_the_same_bits(settle: bool, monkeypatch: pytest.MonkeyPatch):
    columns, rows, found = 65, 200, []
    inner, grid, groups = problem_of(columns, rows, symmetric=False)
    native = library()
    assert isinstance(native, Library)
    for index, runs_here in enumerate(native.available):
        if runs_here:
            alone = replace(native, available=tuple(number == index for number in range(len(native.available))))
            monkeypatch.setattr(native_columns, "library", lambda alone=alone: alone)
            left, codes = random_normal(columns, rows), torch.zeros(columns, rows)
            steps = torch.empty_like(left)
            loop = native_columns.settle_columns if settle else native_columns.round_columns
            loop(left, inner, grid, groups, codes, steps)
            found.append((left, codes, steps))
    assert all(torch.equal(one, other) for each in found for one, other in zip(each, found[0], strict=True))
    assert found[0][1].unique().numel() > 8


@needs_triton
def test_in_the_interpreter(interpreted: Callable[[str], int]):
    assert interpreted(__file__) > 2 * 2 * len(SHAPES)


@needs_triton
@pytest.mark.parametrize("settle", [False, True])
@pytest.mark.parametrize("capability", [80, 90])
def test_compiled_code_keeps_the_tile_in_registers(capability: int, settle: bool, compiled: Callable[..., Any]):
    pointers = ["left_at", "factor_at", "scale_at", "low_at", "high_at", "codes_at", "steps_at"]
    kinds = dict.fromkeys(pointers, "*fp32") | dict.fromkeys(["rows", "columns", "stride"], "i32")
    kinds["groups_at"] = "*i32"
    constants: dict[str, Any] = {"BLOCK": MAX_COLUMNS, "ROWS": triton_columns._ROWS}
    if settle:
        kinds["before_at"] = "*fp32"
    else:
        constants["before_at"] = None
    program = compiled(triton_columns._columns, kinds, constants, capability, num_warps=triton_columns._WARPS)
    assert program.stack == program.count("STL") == program.count("LDL") == 0
    assert 56 <= program.registers <= 72
    assert program.count("MUFU.RCP") > 0  # where IEEE's division begins
    assert program.shared <= 1024


def test_reasons(monkeypatch: pytest.MonkeyPatch):
    assert triton_columns.problem(torch.device("cpu")) == "runs on CUDA, not on cpu"
    monkeypatch.setattr(triton_columns, "unsupported_machine", lambda: "Triton is not installed")
    assert triton_columns.problem(torch.device("cuda")) == "Triton is not installed"
    assert native_columns.problem(torch.device("cuda")) == "runs on CPUs, not on cuda"
    monkeypatch.setattr(native_columns, "library", lambda: "no native library: there is no compiler")
    assert native_columns.problem(torch.device("cpu")) == "no native library: there is no compiler"
