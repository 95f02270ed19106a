"""`bitpress plan` has two subjects, a config and a model with a budget; `run --dry-run` shows the first."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitpress.eval.measure import speed
from bitpress.pipeline.cli import app
from bitpress.pipeline.system import interrupts, packages

Bitpress = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bitpress(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Bitpress:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bitpress", *map(str, arguments)])
        monkeypatch.setattr(interrupts, "handle", lambda handler: None)
        capfd.readouterr()
        code = 0
        try:
            app.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def config(tmp_path: Path, tiny_llama: Path) -> Path:
    value: dict[str, Any] = {"name": "trial", "models": [{"id": str(tiny_llama)}], "device": "cpu"}
    value |= {"recipes": ["int4-g32", "int8-dynamic"], "output": str(tmp_path / "runs"), "eval": {"windows": 2}}
    path = tmp_path / "trial.yaml"
    path.write_text(json.dumps(value))
    return path


def test_a_config_is_planned_and_nothing_is_done(bitpress: Bitpress, config: Path, tmp_path: Path) -> None:
    code, plan, _ = bitpress("plan", config)
    assert (code, bitpress("run", config, "--dry-run")[:2]) == (0, (0, plan))
    assert not (tmp_path / "runs").exists()
    for said in (
        "int8-dynamic",
        "compressed-tensors",
        "loads in: transformers, vLLM, SGLang",
        "every recipe",
        "stated",
    ):
        assert said in plan
    code, out, _ = bitpress("plan", config, "--json", "--set", "recipes.0=int3-g32")
    (described,) = json.loads(out)
    assert [job["recipe"] for job in described["jobs"]] == ["none", "int3-g32", "int8-dynamic"]
    assert all(job["seconds"]["evaluate"] > 0 for job in described["jobs"])


def test_the_exit_code_says_whether_a_run_would_begin(
    bitpress: Bitpress, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = packages.find_spec
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == "bitsandbytes" else real(name))
    code, out, err = bitpress("plan", config, "--set", "recipes.0=nf4")
    assert code == 2
    assert "wanting: nf4: the bitsandbytes package is not installed" in out
    assert err.startswith("error: nf4: the bitsandbytes package is not installed; pip install ")


def test_measured_figures_are_those_of_this_machine(
    bitpress: Bitpress, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitpress.pipeline.runs.rates._SECONDS", 0.01)
    monkeypatch.setattr("bitpress.pipeline.runs.rates._start", lambda: 1.5)
    monkeypatch.setattr(speed, "BANDWIDTH_BYTES", 1 << 20)
    code, out, err = bitpress("plan", config, "--measure", "--json", "--set", "recipes.1=gptq/int4-g32")
    rates = json.loads(out)[0]["rates"]
    assert (code, rates["start"]) == (0, 1.5)
    assert rates["machine"].startswith("measured here: ")
    assert rates["rounding"].keys() == {"absmax/int4-g32", "gptq/int4-g32"}
    assert all(value > 0 for value in rates.values() if isinstance(value, float))
    assert "ten seconds" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--windows", "4", "--choice", "int4-g32"], "--choice, --windows: of a budget"),
        (["--budget", "4bits", "--measure"], "--set, --measure and --nodes are for a config"),
    ],
)
def test_options_of_the_other_subject_are_refused(bitpress: Bitpress, config: Path, options: Any, said: str) -> None:
    code, _, err = bitpress("plan", config, *options)
    assert code == 2
    assert said in err


def test_recommend(bitpress: Bitpress, tiny_llama: Path) -> None:
    code, out, _ = bitpress("recommend", tiny_llama, "--memory", "200kB", "--context", 32, "--for", "vllm")
    assert code == 0
    for said in ("bitpress quantize", "--format", "vLLM loads it as", "not known:", "mean KL where measured"):
        assert said in out
    code, out, _ = bitpress("recommend", tiny_llama, "--memory", "1GB", "--json")
    assert (code, json.loads(out)["chosen"]["recipe"]) == (0, "none")
