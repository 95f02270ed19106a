"""Gates: each against its figure, and a run that misses one: all is written, and the end is not 0."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bitpress.pipeline.cli import app
from bitpress.pipeline.config.load import load_config
from bitpress.pipeline.config.schema import Gates
from bitpress.pipeline.errors import ConfigError
from bitpress.pipeline.evaluate import gates

CONFIG = """
name: gated
models: [{{id: {model}}}]
recipes: [int4-g32]
eval: {{text: {text}, context: 32, windows: 4, speed: null, output_errors: 0}}
gates: {gates}
output: {output}
"""


def metrics(fallbacks: int = 0, **figures: Any) -> dict[str, Any]:
    quality = {"kl_mean": 0.05, "perplexity_ratio": 1.03, "top1_agreement": 0.9, **figures}
    layers = [{"fallback": "singular" if number < fallbacks else None} for number in range(4)]
    return {"quality": quality, "coverage": {"layers": layers}}


EVERY = {"kl_mean": 0.05, "ppl_increase": 0.0301, "top1": 0.9, "fallback_layers": 0}


def test_what_is_just_reached_passes() -> None:
    judged = gates.judge(Gates(**EVERY), metrics())
    assert [entry["gate"] for entry in judged] == list(EVERY)
    assert gates.missed(judged) == []


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"kl_mean": 0.0501}, "mean KL is 0.0501, but gates.kl_mean asks for at most 0.05"),
        ({"perplexity_ratio": 1.04}, "the increase of perplexity is 4%, but gates.ppl_increase asks for at most 3.01%"),
        ({"top1_agreement": 0.8999}, "top-1 agreement is 89.99%, but gates.top1 asks for at least 90%"),
        ({"fallbacks": 2}, "layers that fell back to absmax is 2, but gates.fallback_layers asks for at most 0"),
        ({"kl_mean": None}, "mean KL was not measured, but gates.kl_mean asks for at most 0.05"),
        ({"kl_mean": float("nan")}, "mean KL is nan, but"),
    ],
)
def test_each_is_missed_with_a_sentence(found: dict[str, Any], said: str) -> None:
    [sentence] = gates.missed(gates.judge(Gates(**EVERY), metrics(**found)))
    assert said in sentence


def test_what_is_not_set_is_not_asked() -> None:
    assert gates.judge(Gates(), metrics(kl_mean=None)) == []


@pytest.fixture
def config(tiny_llama: Path, tmp_path: Path) -> Any:
    """config("kl_mean: 1"): the path of a config with these gates."""
    text = tmp_path / "text.txt"
    text.write_text("A gate is what a model must pass; 1 + 1 = 2. " * 20)

    def write(gates: str) -> Path:
        path = tmp_path / "config.yaml"
        filled = CONFIG.format(model=tiny_llama, text=text, output=tmp_path / "runs", gates=f"{{{gates}}}")
        path.write_text(filled)
        return path

    return write


def test_percentages_are_shares(config: Any) -> None:
    found = load_config(config("ppl_increase: 3%, top1: 90%")).gates
    assert (found.ppl_increase, found.top1) == (pytest.approx(0.03), 0.9)


@pytest.mark.parametrize("wrong", ["kl_mean: -1", "top1: 2", "ppl_increase: much", "top1: x%", "kl_men: 1"])
def test_wrong_gates_are_refused(config: Any, wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"gates\.\w+: "):
        load_config(config(wrong))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bitpress", "run", *arguments])
    with pytest.raises(SystemExit) as stop:
        app.main()
    return int(stop.value.code or 0)


def test_a_run_that_misses_one(
    config: Any, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "gated" / "int4-g32"

    def verdict() -> Any:
        return json.loads((folder / "metrics.json").read_text())["gates"]

    missing = "kl_mean: 0.0, top1: 1.0, ppl_increase: 900%"
    assert run(monkeypatch, str(config(missing))) == 8
    said = capfd.readouterr()
    assert "gate missed: mean KL is" in said.err
    assert "gate missed: top-1 agreement is" in said.err
    assert "mean KL is" in said.out
    assert (verdict()["passed"], verdict()["overridden"]) == (False, False)
    assert [entry["passed"] for entry in verdict()["judged"]] == [False, False, True] or [
        (entry["gate"], entry["passed"]) for entry in verdict()["judged"]
    ] == [("kl_mean", False), ("ppl_increase", True), ("top1", False)]
    assert "MISSED" in (folder / "report.md").read_text()
    assert "misses its gates" in (folder / "report.html").read_text()

    # again: measured before, missed as before; then overridden, and that is recorded
    assert run(monkeypatch, str(config(missing))) == 8
    assert "measured before" in capfd.readouterr().err
    assert run(monkeypatch, str(config(missing)), "--override") == 0
    assert (verdict()["passed"], verdict()["overridden"]) == (False, True)
    assert "missed, overridden" in (folder / "report.md").read_text()

    # gates are no part of what was measured: others are judged without measuring again
    capfd.readouterr()
    assert run(monkeypatch, str(config("kl_mean: 1.0"))) == 0
    assert "measured before" in capfd.readouterr().err
    assert verdict()["passed"] is True
    assert run(monkeypatch, str(config(""))) == 0
    assert verdict() is None
