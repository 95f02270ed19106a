"""The kernel benchmark: who takes part, who is wrong, whose turn it is, and what is made of the samples."""

import json
import time
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitpress.kernels.bench import entrants as entrants_module
from bitpress.kernels.bench import measure as bench
from bitpress.kernels.bench.entrants import DENSE, Dense, InProcess, Local, OneDNN, entrants
from bitpress.kernels.bench.measure import TOLERANCE, Cell, Job, Memory, Result, compare, measure, random_weight
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.reference import Reference
from bitpress.kernels.scheme import Scheme

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "cache_bytes", lambda device: 1 << 16)
    monkeypatch.setattr(bench, "_BURST", 1e-6)
    monkeypatch.setitem(entrants_module._COPIED, "cpu", 1 << 14)


class Fake:
    """A contender that notes its calls in `log`, and takes as many seconds as it is told."""

    nbytes, copies, itemsize, longest = 1000, 4, 2, 3

    def __init__(self, name: str, log: list[str], error: float = 0.0, seconds: float = 1.0):
        self.name, self.log, self.wrong, self.taken, self.about = name, log, error, seconds, {}

    def error(self, x: Tensor, expected: Tensor) -> float:
        return self.wrong

    def seconds(self, x: Tensor, calls: int) -> float:
        self.log.append(self.name)
        return self.taken

    def close(self) -> None:
        self.log.append(f"{self.name} closed")


class Wrong(Reference):
    """Leaves out the first 32 input features."""

    name: ClassVar[str] = "wrong"

    def linear(self, x: Tensor, packed: nn.Module, bias: Tensor | None) -> Tensor:
        return F.linear(x[:, 32:], packed.qtensor.dequantize(x.dtype)[:, 32:])


class Failing(Reference):
    name: ClassVar[str] = "failing"

    def linear(self, x: Tensor, packed: nn.Module, bias: Tensor | None) -> Tensor:
        raise RuntimeError("no luck today")


class Unpreparable(Reference):
    name: ClassVar[str] = "unpreparable"

    def pack(self, qtensor: QTensor, dtype: torch.dtype) -> nn.Module:
        raise RuntimeError("out of memory")


def job(*schemes: str, shape: tuple[int, int] = (48, 96), rows: tuple[int, ...] = (1, 7)) -> Job:
    return Job(CPU, tuple(map(Scheme.parse, schemes)), (shape,), rows, rounds=2)


def silent(line: str) -> None:
    pass


def test_contenders_take_turns() -> None:
    log: list[str] = []
    results = compare([Fake("a", log), Fake("b", log)], torch.ones(1, 8), torch.ones(4, 8), rounds=3)
    assert log == ["a", "a", "b", "b", *["a", "b"] * 3]  # how long a burst must be is seen first
    assert [len(result.samples) for result in results] == [3, 3]


def test_a_burst_is_as_long_as_it_must_be_and_uses_no_copy_twice() -> None:
    log: list[str] = []
    slow, fast = (Fake("", log, seconds=seconds) for seconds in (1.0, 1e-9))
    results = compare([slow, fast], torch.ones(1, 8), torch.ones(4, 8), rounds=1)
    assert [result.calls for result in results] == [1, Fake.longest]


@pytest.mark.parametrize("error", [TOLERANCE * 1.01, float("nan"), float("inf")])
def test_what_is_wrong_is_said_and_not_timed(error: float) -> None:
    log: list[str] = []
    result, other = compare(
        [Fake("wrong", log, error), Fake("right", log)], torch.ones(1, 8), torch.ones(4, 8), rounds=2
    )
    assert result.problem is not None
    assert result.problem.startswith("wrong: relative RMS error")
    assert not result.samples
    assert "wrong" not in log
    assert len(other.samples) == 2
    json.dumps(result.__dict__, allow_nan=False)


def test_a_wrong_kernel_a_failing_one_and_one_that_has_no_room() -> None:
    cells = list(
        measure([InProcess(kernel()) for kernel in (Dense, Wrong, Failing, Unpreparable)], job("int4-g32"), silent)
    )
    for cell in cells:
        dense, wrong, failing = cell.results
        assert (dense.name, wrong.name, failing.name) == (DENSE, "wrong", "failing")
        assert len(dense.samples) == 2
        assert dense.error is not None
        assert 0 < dense.error < 2**-7
        assert wrong.error is not None
        assert wrong.error > 0.4  # a third of the terms is missing
        assert failing.problem == "failed: no luck today"
        assert not wrong.samples
        assert not failing.samples
        assert cell.absent == {"unpreparable": "out of memory"}
        assert len(cell.memory.samples) == 2


def test_every_cell_of_a_job() -> None:
    news: list[str] = []
    asked = job("int4-g32", "int8-dynamic", "nf4", shape=(32, 64))
    cells = list(measure(entrants(operators=True), asked, news.append))
    assert [(cell.scheme, cell.rows) for cell in cells] == [
        ("int4-g32", 1), ("int4-g32", 7), ("int8-dynamic", 1), ("int8-dynamic", 7), ("nf4", 1), ("nf4", 7)
    ]  # fmt: skip
    assert news[:2] == ["int4-g32, 32 x 64: preparing", "int4-g32, 32 x 64: 1 row"]
    for cell in cells:
        names = [result.name for result in cell.results]
        assert names[0] == DENSE
        assert not set(names) & set(cell.absent)
        assert "reference" not in names
        for result in cell.results:
            assert result.problem is None, result
            assert len(result.samples) == 2
    assert cells[0].absent["torch fbgemm"] == "serves int8-dynamic only"


def test_all_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Entrant:
        name = "fake"

        def unsupported(self, qtensor: QTensor, device: torch.device) -> str | None:
            return None

        def enter(self, qtensor: QTensor) -> Fake:
            return Fake("fake", log)

    list(measure([Entrant()], job("int4-g32", rows=(1,)), silent))
    assert log[-1] == "fake closed"


@pytest.mark.parametrize("scheme", ["int2-g32", "int3-channel", "int4-g32-asym", "int8-channel", "nf4", "nf4-dq"])
def test_random_weights_are_sound(scheme: str) -> None:
    q = random_weight(Scheme.parse(scheme), (33, 96), CPU)
    q.check()
    assert q.dequantize().std() > 0.01


def test_copies_lie_in_memory_of_their_own_and_are_used_in_turn() -> None:
    class Watching(Dense):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def linear(self, x: Tensor, packed: nn.Module, bias: Tensor | None) -> Tensor:
            self.seen.append(packed.get_buffer("weight").data_ptr())
            return super().linear(x, packed, bias)

    kernel = Watching()
    contender = Local(kernel, random_weight(Scheme.parse("int4-g32"), (32, 64), CPU), torch.bfloat16)
    assert contender.nbytes == 32 * 64 * 2
    assert contender.copies == 4  # of 4096 bytes, in 16384
    assert contender.longest == 3
    contender.seconds(torch.ones(1, 64), 3)
    contender.seconds(torch.ones(1, 64), 3)
    assert len(set(kernel.seen)) == 4
    assert kernel.seen[:4] == kernel.seen[4:]
    contender.close()
    assert not contender.packed


@pytest.mark.parametrize("kernel", entrants(operators=True), ids=lambda entrant: entrant.name)
@pytest.mark.parametrize("scheme", ["int4-g32", "int8-dynamic", "nf4"])
def test_copies_agree(kernel: InProcess, scheme: str) -> None:
    """Whatever a library packed, a copy of it gives the same product."""
    q = random_weight(Scheme.parse(scheme), (64, 128), CPU)
    if reason := kernel.unsupported(q, CPU):
        pytest.skip(reason)
    contender, x = kernel.enter(q), torch.ones(3, 128, dtype=torch.bfloat16)
    assert isinstance(contender, Local)
    products = [contender._linear(x.to(contender.dtype)) for _ in range(contender.copies)]
    for product in products:  # oneDNN packs the scales of a copy anew, and rounds one in its last bit
        torch.testing.assert_close(product, products[0], rtol=2**-20, atol=2**-20)
    assert contender.error(x, x.float() @ q.dequantize().t()) <= TOLERANCE
    assert 64 * 128 // 2 <= contender.nbytes <= 64 * 128 * 2


def test_torchs_engine_is_put_back() -> None:
    before = torch.backends.quantized.engine
    operator = OneDNN()
    q = random_weight(Scheme.parse("int8-dynamic"), (16, 32), CPU)
    if reason := operator.unsupported(q, torch.float32, CPU):
        pytest.skip(reason)
    operator.pack(q, torch.float32)
    assert torch.backends.quantized.engine == before
    assert "not on cuda" in str(operator.unsupported(q, torch.float32, torch.device("cuda")))


def test_an_engine_that_torch_was_built_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OneDNN, "engine", "abacus")
    q = random_weight(Scheme.parse("int8-dynamic"), (16, 32), CPU)
    assert "this PyTorch has the engines" in str(OneDNN().unsupported(q, torch.float32, CPU))


def test_kernels_by_name() -> None:
    assert [entrant.name for entrant in entrants(["reference"])] == [DENSE, "reference"]
    with pytest.raises(ValueError, match=r"kernel 'absent' is unknown; use one of .*reference"):
        entrants(["absent"])


def result(name: str, moved: int, *samples: float) -> Result:
    return Result(name, moved, moved, 1, samples=list(samples))


def test_figures() -> None:
    memory, dense = result("memory", 8_000_000_000, 0.5, 0.25, 1.0), result(DENSE, 4_000_000, 0.002, 0.002, 0.004)
    ours = result("ours", 1_000_000, 0.0005, 0.0004, 0.0001)
    untimed = Result("wrong", 1, 1, 1, problem="wrong")
    cell = Cell("int4-g128", (500, 1000), 2, memory, [dense, ours, untimed], {})
    assert memory.bytes_per_second == 16e9
    assert ours.seconds() == 0.0004
    assert ours.seconds(0) == 0.0001
    assert ours.seconds(0.75) == pytest.approx(0.00045)
    assert cell.share(ours) == pytest.approx(2.5 / 16)
    assert cell.share(dense) == pytest.approx(2 / 16)
    assert cell.gops(ours) == pytest.approx(2 * 2 * 500 * 1000 / 0.0004 / 1e9)
    assert cell.ratio(ours, DENSE) == pytest.approx(5)
    assert cell.ratio(dense, "ours") == pytest.approx(0.2)
    assert cell.ratio(untimed, DENSE) is None
    assert cell.ratio(ours, "wrong") is None
    assert cell.ratio(ours, "absent") is None


def test_bytes_are_those_of_the_weight_and_of_both_ends() -> None:
    (only,) = compare([Fake("a", [])], torch.ones(3, 8), torch.ones(4, 8), rounds=1)
    assert only.moved == 1000 + (3 * 8 + 3 * 4) * 2


def test_json_there_and_back() -> None:
    (cell,) = measure(entrants(["reference"]), job("int8-dynamic", rows=(1,)), silent)
    found = json.loads(json.dumps(cell.to_dict(), allow_nan=False))
    again = Cell(**{**found, "shape": tuple(found["shape"])})
    again.memory, again.results = Result(**found["memory"]), [Result(**each) for each in found["results"]]
    assert again == cell


def test_memory_is_read_by_torch_where_the_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(tensor: Tensor) -> int:
        raise RuntimeError("no native library")

    monkeypatch.setattr(bench, "touch", missing)
    memory = Memory(CPU)
    assert memory.about["by"] == "torch's amax"
    assert memory.about["exceeds_cache"] is True
    assert memory.nbytes == 2 << 16
    assert memory.seconds(torch.ones(1), 1) > 0


def test_memory_is_read_by_whatever_is_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    named = {"slow": lambda tensor: time.sleep(0.02), "fast": lambda tensor: seen.append(tensor.nbytes)}
    monkeypatch.setattr(bench, "readers", lambda: named)
    memory = Memory(CPU)
    assert memory.about["by"] == "fast"
    memory.seconds(torch.ones(1), 1)
    assert seen == [2 << 16] * 2


def test_a_cache_that_cannot_be_exceeded_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_free_bytes", lambda: 1 << 17)
    assert Memory(CPU).about["exceeds_cache"] is False


def test_facts_of_the_system() -> None:
    found: Any = bench._free_bytes()
    assert found > 1 << 20
    assert all(flag.startswith(bench._FLAGS) for flag in bench.cpu_flags())


def test_the_last_caches_are_added_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Two cores share each of two caches of level 3; one of level 2 is of each core alone."""
    monkeypatch.undo()
    for cpu in range(4):
        for index, level, size, shared in ((2, 2, "512K", cpu), (3, 3, "32M", cpu // 2)):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, text in (("level", level), ("size", size), ("shared_cpu_list", shared)):
                (folder / name).write_text(f"{text}\n")
    monkeypatch.setattr(bench, "Path", lambda path: tmp_path if path == "/sys/devices/system/cpu" else tmp_path / "no")
    assert bench.cache_bytes(CPU) == 64 << 20
    assert bench.cpu_flags() == []
    assert bench._free_bytes() == 1 << 30
