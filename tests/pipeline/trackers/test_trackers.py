"""Trackers, where their packages are installed, write offline what a run measured."""

from pathlib import Path

import pytest

from bitpress.pipeline import trackers
from bitpress.pipeline.errors import ConfigError
from bitpress.pipeline.trackers.base import TrackedJob


@pytest.mark.parametrize("name", ["mlflow", "wandb", "tensorboard"])
def test_a_job_is_written_offline(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tracker = trackers.registry()[name]
    if reason := tracker.unsupported():
        pytest.skip(reason)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    report = tmp_path / "report.html"
    report.write_text("<p>report</p>")
    figures = {"kl_mean": 0.25, "task/acc": 0.5}
    where = tracker.send(TrackedJob("demo", "org/m:x int4", {"scheme": "int4-g128"}, figures, [report], tmp_path))
    assert str(tmp_path) in where
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    written = b"".join(bytes(path) + path.read_bytes() for path in files)  # MLflow's files have the names of figures
    for text in (b"kl_mean", b"int4-g128"):
        assert text in written


def test_what_is_unknown_or_not_installed_is_said(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="track: 'mflow' is unknown; did you mean mlflow"):
        trackers.trackers(["mflow"])
    monkeypatch.setattr("bitpress.pipeline.trackers.base.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="wandb needs the package wandb, which is not installed: pip install wandb"):
        trackers.trackers(["wandb"])
