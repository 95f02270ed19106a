"""`bitpress bench kernels`: its tables, its file, its errors, and llama.cpp, in earnest where it is installed."""

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from bitpress.kernels.bench import entrants
from bitpress.kernels.bench import measure as timing
from bitpress.kernels.bench.measure import Cell, random_weight
from bitpress.kernels.scheme import Scheme
from bitpress.pipeline.bench import llamacpp
from bitpress.pipeline.bench.llamacpp import LlamaCpp, ProgramError, find_kernels
from bitpress.pipeline.bench.programs import Program
from bitpress.pipeline.cli import bench
from bitpress.pipeline.errors import BitpressError, ConfigError

CPU = torch.device("cpu")

# Answers as ggml_worker.py does, but that the layout "AMX" ends the process at the first product of many rows.
FAKE = """
import json, os, signal, sys
for line in sys.stdin:
    asked = json.loads(line)
    if asked["do"] == "load":
        layout = next((name for name in ("AMX", "REPACK") if name not in asked["skip"]), None)
        answer = {"layout": layout, "nbytes": 1234, "versions": {"ggml": "1.2"}} if layout else {"failed": "none left"}
    elif asked["do"] == "check":
        if layout == "AMX" and asked["rows"] > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        answer = {"error": 0.005}
    elif asked["calls"] > 100:
        raise SystemError("too many")
    else:
        answer = {"seconds": 0.25}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture(autouse=True)
def small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1 << 16)
    monkeypatch.setattr(timing, "_BURST", 1e-6)
    monkeypatch.setitem(entrants._COPIED, "cpu", 1 << 14)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """run("--rows", 1): the command in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    return lambda *given: runner.invoke(bench.app, ["kernels", "--device", "cpu", *map(str, given)])


@pytest.fixture
def fake(tmp_path: Path) -> LlamaCpp:
    script = tmp_path / "fake_worker.py"
    script.write_text(FAKE)
    return LlamaCpp(Program("llama.cpp", "json", script))


def kept(tmp_path: Path) -> dict[str, Any]:
    (path,) = tmp_path.glob("runs/bench/kernels-cpu-*.json")
    return json.loads(path.read_text())


def test_tables_and_the_file_beside(
    run: Callable[..., Result], fake: LlamaCpp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(llamacpp, "find_kernels", lambda given: fake)
    outcome = run(
        "--scheme", "int4-g32", "--scheme", "nf4", "--shape", "32x64", "--rows", "1,7", "--repeats", 2, "--peers"
    )
    assert outcome.exit_code == 0, outcome.output
    for words in ("int4-g32, 32 x 64", "nf4, 32 x 64", "bf16 linear", "GOPS", "torch fbgemm: serves int8-dynamic only"):
        assert words in outcome.stdout
    assert "passed over AMX: llama.cpp was killed, as the system does when memory runs out" in outcome.stdout
    assert max(map(len, outcome.stdout.splitlines()[:30])) <= 120
    assert "int4-g32, 32 x 64: 7 rows" in outcome.stderr
    found = kept(tmp_path)
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert "flags" in found["machine"]
    assert "torch" in found["versions"]
    assert [(cell["scheme"], cell["rows"]) for cell in found["cells"]] == [
        ("int4-g32", 1), ("int4-g32", 7), ("nf4", 1), ("nf4", 7)
    ]  # fmt: skip
    for cell in found["cells"]:
        peer = next(result for result in cell["results"] if result["name"] == "llama.cpp")
        assert peer["samples"] == [0.25, 0.25]
        assert peer["nbytes"] == 1234
        assert len(cell["memory"]["samples"]) == 2


def test_the_file_that_was_asked_for_is_what_json_prints(run: Callable[..., Result], tmp_path: Path):
    given = ("--scheme", "int8-dynamic", "--shape", "16x32", "--rows", "1", "--repeats", 1, "--kernel", "reference")
    outcome = run(*given, "--json", "--output", tmp_path / "deep" / "here.json")
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stdout == (tmp_path / "deep" / "here.json").read_text() + "\n"
    (cell,) = json.loads(outcome.stdout)["cells"]
    assert [result["name"] for result in cell["results"]] == ["bf16 linear", "reference"]
    assert not list(tmp_path.glob("runs"))


def test_threads(run: Callable[..., Result], tmp_path: Path):
    before = torch.get_num_threads()
    try:
        assert run("--scheme", "nf4", "--shape", "16x64", "--rows", "1", "--repeats", 1, "--threads", 1).exit_code == 0
        assert kept(tmp_path)["machine"]["threads"] == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--shape", "64"), "--shape 64: expected OUTxIN"),
        (("--shape", "0x64"), "expected OUTxIN"),
        (("--shape", "8x65"), "--shape 8x65 with int4-g128: in_features 65 is not divisible"),
        (("--rows", "1,,2"), "--rows 1,,2: expected numbers"),
        (("--rows", "0"), "expected numbers"),
        (("--scheme", "int5"), "'int5' is not a scheme"),
        (("--kernel", "absent"), "kernel 'absent' is unknown"),
        (("--peer", "llama.ccp=python"), "did you mean llama.cpp?"),
        (("--peer", "llama.cpp"), "expected NAME=PYTHON"),
        (("--peer", "llama.cpp=no/such/python"), "cannot be run"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_runs(run: Callable[..., Result], given: Any, said: str):
    outcome = run(*given)
    assert isinstance(outcome.exception, ConfigError)
    assert said in str(outcome.exception)


SMALL = ("--scheme", "nf4", "--shape", "16x64", "--rows", "1,2", "--repeats", 1, "--kernel", "reference")


def test_ctrl_c_keeps_what_is_measured(run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*given: Any) -> Iterator[Cell]:
        yield next(measure(*given))
        raise KeyboardInterrupt

    measure = timing.measure
    monkeypatch.setattr(timing, "measure", interrupted)
    outcome = run(*SMALL)
    assert outcome.exit_code != 0
    assert [cell["rows"] for cell in kept(tmp_path)["cells"]] == [1]
    assert "nf4, 16 x 64" in outcome.stdout
    assert "every sample is in runs/bench" in outcome.stdout
    assert "1 of 2; about 1 min left" in outcome.stderr


def test_a_budget_of_time(run: Callable[..., Result], tmp_path: Path):
    outcome = run(*SMALL, "--minutes", 0)
    assert outcome.exit_code == 0, outcome.output
    assert len(kept(tmp_path)["cells"]) == 1
    assert "no time left for 1 of 2 (--minutes)" in outcome.stderr


def test_quick_is_one_shape_and_few_rows(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch):
    jobs: list[Any] = []
    monkeypatch.setattr(timing, "measure", lambda everyone, job, news: iter(jobs.append(job) or []))
    assert run("--quick", "--repeats", 7).exit_code == 0
    (job,) = jobs
    assert (job.shapes, job.rows, job.rounds) == (((4096, 4096),), (1, 32), 7)


def test_an_absent_peer_is_named(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Program, "installed", lambda self: False)
    outcome = run("--scheme", "nf4", "--shape", "16x64", "--rows", "1", "--repeats", 1, "--peers")
    assert (
        "llama.cpp: llama-cpp-python is not installed here; say where it is: --peer llama.cpp=PYTHON" in outcome.stdout
    )
    with pytest.raises(ConfigError, match="has no package llama_cpp"):
        find_kernels(["llama.cpp=python"])


def test_a_wrong_kernel_is_shown_as_wrong(capsys: pytest.CaptureFixture[str]):
    wrong = timing.Result("ours", 8, 8, 1, error=0.5, problem="wrong: relative RMS error 0.5")
    about = {"exceeds_cache": False, "cache_bytes": None, "by": "eye"}
    memory = timing.Result("memory", 8_000_000, 8_000_000, 1, about, samples=[1.0, 2.0])
    cell = Cell("int4-g128", (4, 128), 3, memory, [wrong], {})
    bench._show_cell(cell, first=True)
    out = "\n".join([capsys.readouterr().out, *bench._notes([cell])])
    assert "wrong" in out
    assert "50.00%" in out
    assert "ours, int4-g128, 4 x 128, 3 rows: wrong: relative RMS error 0.5" in out
    assert "memory: 8 MB, by eye; last-level cache: size unknown" in out
    assert "weights may come from it" in out
    assert "1 of 1 medians are unsteady" in out


def test_a_layout_that_crashes_is_passed_over(fake: LlamaCpp):
    contender = fake.enter(random_weight(Scheme.parse("int8-dynamic"), (64, 64), CPU))
    assert contender.about == {
        "format": "q8_0", "layout": "REPACK", "ggml": "1.2",
        "passed over AMX": "llama.cpp was killed, as the system does when memory runs out",
    }  # fmt: skip
    assert contender.seconds(torch.ones(2, 64), 3) == 0.25
    contender.close()
    assert contender.process.returncode == 0


def test_a_worker_that_ends_says_why(fake: LlamaCpp):
    contender = fake.enter(random_weight(Scheme.parse("nf4"), (64, 64), CPU))
    with pytest.raises(ProgramError, match=r"llama.cpp ended with exit code 1: SystemError: too many"):
        contender.seconds(torch.ones(1, 64), 1000)
    with pytest.raises(ProgramError, match="exit code 1"):
        contender.seconds(torch.ones(1, 64), 1)
    contender.close()


def test_no_layout_works(fake: LlamaCpp):
    fake.program.script.write_text(FAKE.replace('layout == "AMX" and ', ""))
    with pytest.raises(ProgramError, match="none left") as caught:
        fake.enter(random_weight(Scheme.parse("nf4"), (64, 64), CPU))
    assert isinstance(caught.value, BitpressError)
    assert isinstance(caught.value, RuntimeError)  # for the benchmark, which knows no BitpressError


def test_what_llama_cpp_cannot_do(fake: LlamaCpp):
    def reason(scheme: str, shape: tuple[int, int], device: str = "cpu") -> str | None:
        return fake.unsupported(random_weight(Scheme.parse(scheme), shape, CPU), torch.device(device))

    assert reason("int3-g32", (8, 64)) == "has no format like int3-g32"
    assert reason("int4-channel", (8, 40)) == "in_features 40 is not divisible by its block of 32"
    assert "not those for cuda" in str(reason("nf4", (8, 64), "cuda"))
    assert reason("nf4", (8, 64)) is None


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("scheme", ["int4-g32", "int8-dynamic", "nf4"])
@pytest.mark.parametrize("shape", [(1, 32), (65, 96), (256, 256)])
def test_llama_cpp(scheme: str, shape: tuple[int, int]):
    contender = find_kernels([]).enter(random_weight(Scheme.parse(scheme), shape, CPU))
    try:
        for rows in (1, 7, 33):
            x = torch.ones(rows, shape[1])
            assert contender.error(x, x) < 2**-6  # activations are rounded to 8 bits in blocks of 32
            assert contender.seconds(x, 2) > 0
    finally:
        contender.close()
