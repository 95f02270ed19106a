"""The quality benchmark: rows that are kept, fail, find no time; and the command with a peer that writes nothing."""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from bitpress.eval.report.quality_page import Row
from bitpress.pipeline.bench import programs, quality
from bitpress.pipeline.bench.programs import Program
from bitpress.pipeline.bench.quality import Comparison, compare, in_turns, peer_schemes
from bitpress.pipeline.cli import app
from bitpress.pipeline.errors import ConfigError

METRICS = {
    "quality": {
        "kl_mean": 0.01, "kl_mean_se": 0.001, "perplexity": 11.0, "perplexity_ratio": 1.1, "top1_agreement": 0.9
    },
    "size": {"file_bytes": 1000, "bits_per_weight": {"all": 4.25}},
    "kernels": {},
}  # fmt: skip
SMALL = "{name: small, method: absmax, scheme: int4-g32, layers: {lm_head: int8-channel}}"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return path


@pytest.fixture
def comparison(tiny_llama: Path, text: Path, tmp_path: Path) -> Comparison:
    read = {"text": str(text), "windows": 4, "context": 16}
    return Comparison.make(str(tiny_llama), {**read, "seed": None}, read, "cpu", tmp_path / "out")


@dataclass
class Fake:
    """An entrant that needs no time, and counts how often it is measured."""

    program: str
    recipe: str
    problem: Exception | None = None
    calls: list[Path] = field(default_factory=list)

    def fingerprint(self) -> dict[str, Any]:
        return {}

    def measure(self, comparison: Comparison, folder: Path) -> Row:
        self.calls.append(folder)
        if self.problem:
            raise self.problem
        return Row(self.program, self.recipe, nbytes=100, bits_per_weight=4.0, kl_mean=0.01, kl_mean_se=0.001)


def test_a_finished_row_is_kept_and_a_failed_one_is_tried_again(comparison: Comparison):
    good, bad, later = Fake("bitpress", "int4"), Fake("peer", "int4", ValueError("no luck")), Fake("peer", "int3")
    news: list[str] = []
    for _ in range(2):
        rows = compare(comparison, [good, bad, later], None, news.append)
        assert [row.name for row in rows] == ["bitpress int4", "peer int4", "peer int3"]
        assert "no luck" in str(rows[1].problem)
    assert [len(entrant.calls) for entrant in (good, bad, later)] == [1, 2, 1]
    assert "measured before" in news[3]
    assert (comparison.folder / "quality.html").exists()


def test_ctrl_c_keeps_what_is_finished(comparison: Comparison):
    good, stopped = Fake("bitpress", "int4"), Fake("peer", "int4")
    stopped.problem = KeyboardInterrupt()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        compare(comparison, [good, stopped], None, lambda line: None)
    assert [row["recipe"] for row in json.loads((comparison.folder / "quality.json").read_text())["rows"]] == ["int4"]
    stopped.problem = None
    assert len(compare(comparison, [good, stopped], None, lambda line: None)) == 2
    assert len(good.calls) == 1


def test_other_tokens_are_another_row(comparison: Comparison, tiny_llama: Path, text: Path):
    entrant, read = Fake("bitpress", "int4"), {"text": str(text), "windows": 3, "context": 16}
    compare(comparison, [entrant], None, lambda line: None)
    other = Comparison.make(str(tiny_llama), {**read, "seed": None}, read, "cpu", comparison.folder)
    compare(other, [entrant], None, lambda line: None)
    assert len(set(entrant.calls)) == 2


def test_no_row_begins_that_would_end_too_late(comparison: Comparison, monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(quality.time, "monotonic", lambda: next(clock))
    entrants = [Fake("bitpress", str(number)) for number in range(4)]
    rows = compare(comparison, entrants, 35.0, lambda line: None)
    problems = [row.problem for row in rows]
    assert problems[0] is None
    assert problems[-1] == "no time left for it (--minutes)"


def test_rows_that_were_measured_before_tell_how_long_others_take(comparison: Comparison):
    @dataclass
    class Slow(Fake):
        def measure(self, comparison: Comparison, folder: Path) -> Row:
            return replace(super().measure(comparison, folder), seconds={"quantize": 500.0, "measure": 100.0})

    everyone = [Slow("bitpress", str(number)) for number in range(4)]
    compare(comparison, [everyone[0], everyone[3]], None, lambda line: None)
    rows = compare(comparison, everyone, 590.0, lambda line: None)
    assert [row.problem for row in rows] == [None, *2 * ["no time left for it (--minutes)"], None]
    news: list[str] = []
    compare(comparison, everyone, None, news.append)
    # The third alone is left: the mean of 600 s, 600 s and next to nothing, which the second takes here, is 7 minutes.
    assert news[1].endswith("; about 7 min left")
    assert [len(entrant.calls) for entrant in everyone] == [1, 1, 1, 1]


def test_programs_take_turns():
    order = in_turns([Fake("a", "1"), Fake("a", "2"), Fake("a", "3"), Fake("b", "1")])
    assert [entrant.program + entrant.recipe for entrant in order] == ["a1", "b1", "a2", "a3"]


@pytest.mark.parametrize("name", ["int8-dynamic", "nf4", "int5"])
def test_schemes_that_no_peer_has(name: str):
    with pytest.raises(ConfigError, match=f"--peer-scheme {name}"):
        peer_schemes([], [name])


def test_the_command(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    script = tmp_path / "fake_job.py"
    script.write_text("import sys; sys.exit('no luck today')")
    monkeypatch.setattr(programs, "find", lambda peers: [Program("fake", "json", script)])
    monkeypatch.setattr(quality, "evaluate_external", lambda *given: METRICS)
    arguments = [tiny_llama, "--recipe", SMALL, "--peer-scheme", "int4-g32", "--quick", "--json"]
    arguments += ["--calibration", text, "--windows", 4, "--text", text, "--context", 16, "-o", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["bitpress", "bench", "quality", *map(str, arguments)])
    monkeypatch.setattr("signal.signal", lambda *given: None)
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert not ended.value.code
    out, err = capfd.readouterr()
    ours, theirs = json.loads(out)["rows"]
    assert (ours["kl_mean"], ours["bits_per_weight"]) == (0.01, 4.25)
    assert "no luck today" in theirs["problem"]
    assert "1 of 2: bitpress small: KL 0.0100 (± 0.0010) at 4.25 bits per weight" in err
    left = [path.name for path in (tmp_path / "out").rglob("*.safetensors")]
    assert left == ["tokens.safetensors"]  # the artifact is gone once it is measured
