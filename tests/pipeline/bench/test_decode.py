"""The decode benchmark: rows, ratios, a peer that fails, and the command on a tiny model."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bitpress.pipeline.bench import decode
from bitpress.pipeline.bench.decode import Job, Row, measure, random_model, table
from bitpress.pipeline.bench.llamacpp import ProgramError
from bitpress.pipeline.bench.programs import Program
from bitpress.pipeline.cli import bench
from bitpress.pipeline.errors import ConfigError
from bitpress.pipeline.storage.checkpoint import Checkpoint

# Answers as llamacpp_decode_job.py does.
FAKE = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    print(json.dumps({"versions": {}} if asked["do"] == "load" else {"prefill": 2.0, "decode": 4.0}), flush=True)
"""


class Steady:
    """A contender of constant speed: seconds of the prompts, and of what follows."""

    def __init__(self, name: str, seconds: tuple[float, float] | None):
        self.name, self.seconds, self.about = name, seconds, dict[str, Any]()

    def run(self, batch: int, prompt: int, generate: int) -> tuple[float, float]:
        if self.seconds is None:
            raise ProgramError(f"{self.name} ended")
        return self.seconds


def test_rows_are_yielded_as_they_are_measured_and_a_failed_one_is_out():
    everyone = [Steady("transformers bfloat16", (2.0, 4.0)), Steady("bitpress a", (1.0, 1.0)), Steady("other", None)]
    steps = list(measure(everyone, Job((1, 3), 8, 4, 2), lambda line: None))
    assert [complete for _, complete in steps] == [False, False, False, True] * 2
    rows = steps[-1][0]
    assert (rows[1].prefill, rows[1].decode) == ([24.0, 24.0], [12.0, 12.0])
    header, cells = table(rows)
    assert header[4:6] == ["prefill x transformers", "prefill x other"]
    assert cells[1] == ["bitpress a", "3", "24.0 (24.0–24.0)", "12.0 (12.0–12.0)", "2.00", "–", "4.00", "–"]
    assert cells[2][2] == "failed"
    assert rows[2].problem == "other ended"
    assert Row("x", 1).median("decode") is None


def test_the_command(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    monkeypatch.setattr("bitpress.pipeline.bench.llamacpp.find", lambda pythons, name: Program("llama.cpp", "", script))
    monkeypatch.setattr(decode, "convert", lambda checkpoint, source, to, out: [])
    path = tmp_path / "out.json"
    given = ["decode", str(tiny_llama), "--recipe", "int4-g32", "--peer", "llama.cpp=python", "--batch", "2"]
    outcome = CliRunner().invoke(
        bench.app, [*given, "--prompt", "4", "--tokens", "2", "--rounds", "1", "-o", str(path)]
    )
    assert outcome.exit_code == 0, outcome.output
    assert "bitpress int4-g32" in outcome.stdout
    assert "batch 2, round 1 of 1: llama.cpp int4-g32: prefill 4.0, decode 1.0 tokens/s" in outcome.stderr
    kept = json.loads(path.read_text())
    assert [row["name"].split()[0] for row in kept["rows"]] == ["transformers", "bitpress", "llama.cpp"]
    assert kept["about"]["bitpress int4-g32"]["selected"]
    assert (kept["prompt"], kept["generate"]) == (4, 2)


def test_random_weights_in_the_place_of_quantized_ones(tiny_llama: Path):
    model = random_model(Checkpoint(tiny_llama), decode.pick_device("cpu"))
    assert all(parameter.abs().max() > 0 for parameter in model.parameters())


@pytest.mark.parametrize(
    ("given", "said"),
    [(["--batch", "1,,8"], "--batch 1,,8: expected numbers"), (["--peer", "vllm=p"], "peer 'vllm=p'")],
)
def test_what_cannot_be_meant_is_refused_before_anything_runs(given: list[str], said: str):
    outcome = CliRunner().invoke(bench.app, ["decode", "no-such-model", *given])
    assert isinstance(outcome.exception, ConfigError)
    assert said in str(outcome.exception)
