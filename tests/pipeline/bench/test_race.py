"""The benchmark against peers: its arguments, its table, and peers that succeed, fail, or write what none can load."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bitpress.kernels.scheme import Scheme
from bitpress.pipeline.bench import programs, race
from bitpress.pipeline.bench.cost import Cost, measured
from bitpress.pipeline.bench.programs import Program, find, run
from bitpress.pipeline.bench.race import Job, Result, make_job
from bitpress.pipeline.cli import app
from bitpress.pipeline.data.calibration import Calibration
from bitpress.pipeline.errors import BitpressError, CheckpointError, ConfigError, NumericsError

QUALITY = {"perplexity": 11.0, "baseline_perplexity": 10.0, "kl_mean": 0.0123}
FAKE = """
import json, pathlib, sys
request = json.loads(pathlib.Path(sys.argv[1]).read_text())
if request["options"].get("fail"):
    sys.exit("no luck today")
folder = pathlib.Path(request["output"])
folder.mkdir()
(folder / "seen.json").write_text(json.dumps(request))
print("chatter")
answer = {"seconds": 0.5, "versions": {"fake": "1.2", "torch": "2"}}
pathlib.Path(request["answer"]).write_text(json.dumps(answer))
"""


@pytest.fixture
def fake(tmp_path: Path) -> Callable[..., Program]:
    """fake(name, fail=True): a program that quantizes nothing."""
    script = tmp_path / "fake_job.py"
    script.write_text(FAKE)
    return lambda name, **options: Program(name, "json", script, options=options)


@pytest.fixture
def job(tiny_llama: Path) -> Job:
    ids = torch.arange(64).view(4, 16)
    return Job(tiny_llama, Scheme.parse("int3-g32-asym"), Calibration("some text", ids, None))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """bench("--json"): `bitpress bench quantize` in this process: exit code, output, errors."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bitpress", "bench", "quantize", *map(str, arguments)])
        monkeypatch.setattr("signal.signal", lambda *given: None)
        code = 0
        try:
            app.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return path


def cost(wall: float) -> Cost:
    return Cost(wall, 2 * wall, int(wall * 1e8))


def test_the_table_has_medians_and_ratios_to_bitpress():
    ours = Result("bitpress", {"bitpress": "0.1"}, [cost(1), cost(3), cost(2)], [1.5, 1.0, 2.0], QUALITY)
    theirs = Result("peer", {"peer": "9", "torch": "2"}, [cost(5)], [4.0], dict(QUALITY, kl_mean=None))
    header, rows = race.rows([ours, theirs, Result("broken", error="exit code 1")])
    assert header == [
        "program", "wall s", "ratio", "quantizing s", "CPU s", "ratio", "peak RSS MB", "ratio", "mean KL", "perplexity"
    ]  # fmt: skip
    assert rows[0] == [
        "bitpress 0.1", "2.0", "1.00x", "1.5", "4.0", "1.00x", "200", "1.00x", "0.01230", "11.000 (+10.00%)"
    ]  # fmt: skip
    assert rows[1] == ["peer 9", "5.0", "2.50x", "4.0", "10.0", "2.50x", "500", "2.50x", "–", "11.000 (+10.00%)"]
    assert rows[2] == ["broken", "failed", *["–"] * 8]


def test_speed_alone_has_no_columns_of_quality():
    header, rows = race.rows([Result("bitpress", {}, [cost(1)], [1.0])])
    assert header[-2:] == ["peak RSS MB", "ratio"]
    assert len(rows[0]) == len(header)


def test_every_program_is_given_the_same_job_in_turns(fake: Callable[..., Program], job: Job, tmp_path: Path):
    news: list[str] = []
    results = race.race([fake("one"), fake("two", act_order=True)], job, 2, tmp_path, news.append)
    assert [line.split(" took")[0] for line in news] == [
        "run 1 of 2: one", "run 1 of 2: two", "run 2 of 2: one", "run 2 of 2: two"
    ]  # fmt: skip
    assert [len(result.costs) for result in results] == [2, 2]
    assert results[1].versions == {"fake": "1.2", "torch": "2"}
    seen = [json.loads((tmp_path / name / "seen.json").read_text()) for name in ("one", "two")]
    assert seen[1].pop("options") == {"act_order": True}
    for request in seen:
        assert request["model"] == str(job.model.resolve())
        assert torch.equal(load_file(request["tokens"])["ids"], job.calibration.ids)
        assert (request["bits"], request["group_size"], request["symmetric"]) == (3, 32, False)


def test_a_peer_that_fails_is_out_and_says_why(fake: Callable[..., Program], job: Job, tmp_path: Path):
    news: list[str] = []
    first, second = race.race([fake("one"), fake("two", fail=True)], job, 2, tmp_path, news.append)
    assert (len(first.costs), len(second.costs)) == (2, 0)
    assert first.error is None
    assert "exit code 1" in str(second.error)
    assert "no luck today" in str(second.error)
    assert len(news) == 3  # it is not tried again


def test_bitpress_failing_ends_the_race(fake: Callable[..., Program], job: Job, tmp_path: Path):
    ours = replace(fake("bitpress", fail=True), peer=False)
    with pytest.raises(BitpressError, match="no luck today"):
        race.race([ours, fake("two")], job, 1, tmp_path, print)


def test_a_program_that_ends_without_an_answer_has_failed(fake: Callable[..., Program], job: Job, tmp_path: Path):
    program = fake("silent")
    program.script.write_text("print('done nothing')")
    asked = programs.request(job.model, tmp_path / "tokens", tmp_path / "out", job.scheme)
    with pytest.raises(BitpressError, match="done nothing"):
        run(program, asked)


def test_the_cost_is_that_of_the_process_and_its_children(tmp_path: Path):
    busy = "import time; start = time.process_time()\nwhile time.process_time() - start < 0.4: pass"
    parent = f"import subprocess, sys; held = bytearray(60_000_000); subprocess.run([sys.executable, '-c', {busy!r}])"
    with (tmp_path / "log").open("wb") as log:
        code, found = measured([sys.executable, "-c", parent], log)
    assert code == 0
    assert found.cpu >= 0.4
    assert found.wall >= 0.4
    assert found.peak_rss_bytes > 60e6


@pytest.mark.parametrize(
    ("peer", "said"),
    [
        ("gptqmodel", "expected NAME=PYTHON"),
        ("gptqmodel=", "expected NAME=PYTHON"),
        ("gptqmodle=python", "did you mean gptqmodel?"),
        ("gptqmodel=no/such/python", "cannot be run"),
    ],
)
def test_a_peer_that_cannot_be_meant(peer: str, said: str):
    with pytest.raises(ConfigError) as caught:
        find([peer])
    assert said in str(caught.value)


def test_peers_are_those_installed_and_those_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    known = {"here": ("json", tmp_path / "a.py"), "absent": ("no_such_package", tmp_path / "b.py")}
    monkeypatch.setattr(programs, "other_programs", lambda: known)
    assert [program.name for program in find([])] == ["here"]
    python = tmp_path / "python"  # another path, so that it is asked rather than looked up here
    python.symlink_to(sys.executable)
    assert [program.python for program in find([f"here={python}"])] == [str(python)]
    with pytest.raises(ConfigError, match="has no package no_such_package"):
        find([f"absent={python}"])


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"scheme": "nf4"}, ConfigError, "not to nf4"),
        ({"scheme": "int8-dynamic"}, ConfigError, "not to int8-dynamic"),
        ({"scheme": "int5"}, ConfigError, "int5"),
        ({"calibration": {"text": "absent.txt", "context": 16}}, ConfigError, "absent.txt"),
        ({"calibration": {"windows": 1000}}, NumericsError, "calibration needs"),
        ({"text": {"text": "absent.txt"}}, ConfigError, "absent.txt"),
    ],
)
def test_a_job_is_refused_before_anything_runs(
    tiny_llama: Path, text: Path, change: dict[str, Any], kind: type[BitpressError], said: str
):
    settings = {"text": str(text), "windows": 4, "context": 16, **change.get("calibration", {})}
    with pytest.raises(kind) as caught:
        make_job(str(tiny_llama), change.get("scheme", "int4-g32"), settings, change.get("text"))
    assert said in str(caught.value)


def test_the_command(
    tiny_llama: Path, text: Path, fake: Callable[..., Program], monkeypatch: pytest.MonkeyPatch,
    bench: Callable[..., tuple[int, str, str]],
):  # fmt: skip
    """bitpress in earnest, beside a peer whose folder holds no checkpoint."""

    def measure(artifact: Path, *given: Any) -> dict[str, Any]:
        if not (artifact / "config.json").exists():
            raise CheckpointError("no checkpoint")
        return {"quality": QUALITY}

    monkeypatch.setattr(programs, "other_programs", lambda: {"fake": ("json", fake("fake").script)})
    monkeypatch.setattr(race, "measure", measure)
    code, out, err = bench(
        tiny_llama, "--recipe", "int4-g32", "--recipe", "{name: halved, scheme: int4-g64, method: gptq}",
        "--calibration", text, "--windows", 4,
        "--context", 16, "--text", text, "--json",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    ours, second, theirs = found["results"]
    assert [each["name"] for each in found["results"]] == ["bitpress int4-g32", "bitpress halved", "fake"]
    assert second["costs"]
    assert found["calibration"]["tokens"] == 64
    assert ours["costs"][0]["wall"] > ours["seconds"][0] > 0
    assert ours["quality"] == QUALITY
    assert theirs["quality"] is None
    assert theirs["error"] == "not measured: no checkpoint"
    assert "run 1 of 1: fake took" in err


def test_the_command_prints_a_table(
    tiny_llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch, bench: Callable[..., tuple[int, str, str]]
):
    result = Result("bitpress", {"bitpress": "0.1"}, [cost(1)], [1.0])
    monkeypatch.setattr(race, "race", lambda *given: [result])
    given = (tiny_llama, "--scheme", "int4-g32", "--calibration", text, "--windows", 4, "--context", 16)
    code, out, err = bench(*given)
    assert code == 0, err
    assert "| bitpress 0.1 |" in out
    assert "text.txt: 4 windows of 16 tokens" in out


def test_the_command_maps_errors_to_exit_codes(tiny_llama: Path, bench: Callable[..., tuple[int, str, str]]):
    code, _, err = bench(tiny_llama, "--calibration", "absent.txt", "--peer", "vllm=python")
    assert code == ConfigError.exit_code
    assert "gptqmodel, llm-compressor" in err
