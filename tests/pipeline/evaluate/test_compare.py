"""`bitpress compare`: finds finished runs, refuses what cannot be compared, writes three files."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bitpress.pipeline.cli.app import app
from bitpress.pipeline.errors import CheckpointError, ConfigError
from bitpress.pipeline.evaluate import metrics as shape
from bitpress.pipeline.evaluate.compare import compare


def metrics(scheme: str, size: int, kl: float | None) -> dict[str, Any]:
    windows: dict[str, Any] = {"tokens": [100] * 4, "nll": [230.0] * 4}
    windows |= {} if kl is None else {"kl": [100 * kl] * 4}
    return {
        "format_version": 2,
        "model": {"id": "org/model"},
        "scheme": scheme,
        "protocol": {"name": "gptq-2048", "text": "wiki", "text_sha256": "ab", "context": 2048},
        "quality": {"perplexity": 10.0, "kl_mean": kl, "windows": windows},
        "size": {"file_bytes": size},
        "memory": {"resident_bytes": size},
    }


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for found in (
        metrics("none", 16_000_000_000, None),
        metrics("int8-dynamic", 8_000_000_000, 0.001),
        metrics("nf4", 5_000_000_000, 0.01),
    ):
        folder = tmp_path / "runs" / "demo" / found["scheme"]
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(shape.sealed(found)))
    return tmp_path / "runs"


def compared(folder: Path) -> list[str]:
    (model,) = json.loads((folder / "compare.json").read_text())["models"]
    return [run["run"] for run in model["runs"]]


def test_the_command(runs: Path, tmp_path: Path):
    outcome = CliRunner().invoke(app, ["compare", str(runs), "-o", str(tmp_path / "page"), "--budget", "6GB"])
    assert outcome.exit_code == 0
    assert "6GB" in outcome.output
    assert "nf4: it has the least KL of what fits" in outcome.output
    assert sorted(file.name for file in (tmp_path / "page").iterdir()) == [
        "compare.html", "compare.json", "compare.md", "results.csv",
    ]  # fmt: skip
    assert compared(tmp_path / "page") == ["baseline", "int8-dynamic", "nf4"]


def test_a_run_a_folder_of_runs_or_a_file_each_once(runs: Path, tmp_path: Path):
    compare([runs / "demo" / "nf4", runs / "demo" / "none" / "metrics.json"], tmp_path / "two")
    assert compared(tmp_path / "two") == ["baseline", "nf4"]
    compare([runs, runs / "demo", runs / "demo" / "nf4"], tmp_path / "all")
    assert compared(tmp_path / "all") == ["baseline", "int8-dynamic", "nf4"]


def test_what_cannot_be_compared_is_a_sentence(runs: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="does not exist"):
        compare([tmp_path / "absent"], tmp_path / "page")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no checkpoint and no metrics\.json"):
        compare([tmp_path / "empty"], tmp_path / "page")
    with pytest.raises(ConfigError, match="--budget lots: expected an amount of memory"):
        compare([runs], tmp_path / "page", ["lots"])
    path = runs / "demo" / "nf4" / "metrics.json"
    other = json.loads(path.read_text())
    path.write_text(json.dumps(shape.sealed({**other, "protocol": {**other["protocol"], "name": "word"}})))
    with pytest.raises(ConfigError, match="do not compare"):
        compare([runs], tmp_path / "page")
    path.write_text(json.dumps({**other, "format_version": 1}))
    with pytest.raises(CheckpointError, match="format_version 1, expected 2"):
        compare([runs], tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_the_published_schema_is_that_of_the_types():
    published = Path(shape.__file__).with_name("metrics.schema.json")
    assert json.loads(published.read_text()) == shape.schema(), "write schema() to metrics.schema.json"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ({"memory": {"resident_bytes": "many"}}, "memory.resident_bytes"),
        ({"quality": {"windows": {"tokens": [1, 2], "nll": [1.0]}}}, "not of one length"),
        ({"quality": {"kl_mean": float("nan")}}, "quality.kl_mean"),
        ({"scheme": ["nf4"]}, "scheme"),
        ({"speed": {"batch": 1}}, "speed"),
        ({"model": None}, "model"),
    ],
)
def test_what_is_no_metrics_is_told_by_its_field(runs: Path, tmp_path: Path, spoil: dict[str, Any], said: str):
    path = runs / "demo" / "nf4" / "metrics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **spoil}))
    with pytest.raises(CheckpointError, match=f"nf4/metrics.json: not the metrics of a run(.|\n)*{said}"):
        compare([runs], tmp_path / "page")
