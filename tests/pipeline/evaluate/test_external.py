"""Checkpoints that no run made: measured like the runs beside them, once, and refused where that cannot be."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from bitpress.pipeline import quantize
from bitpress.pipeline.cli.app import app
from bitpress.pipeline.config.schema import Run
from bitpress.pipeline.errors import BitpressError, CheckpointError, ConfigError
from bitpress.pipeline.evaluate import measure, process
from bitpress.pipeline.evaluate.compare import compare
from bitpress.pipeline.evaluate.metrics import read_metrics, sealed
from bitpress.pipeline.runs.run import execute

TEXT = "".join(f"{number} green bottles hanging on the wall\n" for number in range(20))
pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A folder with a finished run of two recipes, and the artifact of one as somebody's checkpoint."""
    folder = tmp_path_factory.mktemp("external")
    (folder / "text.txt").write_text(TEXT)
    settings = {"text": str(folder / "text.txt"), "context": 32, "windows": 6, "speed": None, "dtype": "float32"}
    config = {"name": "tiny", "models": [{"id": str(tiny_llama)}], "recipes": ["int4-g32", "int8-channel"]}
    run = Run.model_validate({**config, "eval": settings, "output": str(folder / "runs")})
    assert all(outcome.metrics for outcome in execute(run, "", lambda line: None))
    shutil.copytree(folder / "runs" / "tiny" / "int4-g32" / "artifact", folder / "theirs")
    for name in ("bitpress.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / "theirs" / name).unlink()
    return folder


def figures(folder: Path) -> dict[str, Any]:
    (model,) = json.loads((folder / "compare.json").read_text())["models"]
    return model


def test_stands_beside_the_runs_by_the_same_figures(made: Path, tmp_path: Path) -> None:
    """The files are those of a run, but for what only bitpress writes: so is all that was measured."""
    said: list[str] = []
    compare([made / "runs", made / "theirs"], tmp_path / "page", command="bitpress compare", say=said.append)
    assert said == [f"{made / 'theirs'}: measured like the runs, against tiny-llama"]
    found = figures(tmp_path / "page")
    runs = {run["run"]: run for run in found["runs"]}
    assert list(runs) == ["baseline", "int8-channel", "int4-g32", "int4-g32 theirs"]
    theirs, ours = runs["int4-g32 theirs"], runs["int4-g32"]
    for key in ("kl_mean", "perplexity", "file_bytes", "bits_per_weight", "format", "top1_agreement"):
        assert theirs[key] == ours[key], key
    (same,) = [pair for pair in found["differences"] if {pair["run"], pair["other"]} == {theirs["run"], ours["run"]}]
    assert (same["difference"], same["standard_error"], same["differ"]) == (0.0, 0.0, False)
    assert len(found["differences"]) == 3
    (kept,) = (tmp_path / "page" / "measured").iterdir()
    metrics = read_metrics(kept / "metrics.json")
    mine = read_metrics(made / "runs" / "tiny" / "int4-g32" / "metrics.json")
    assert metrics["size"] == mine["size"]
    for key in ("decoder_bytes", "quantized_bytes", "share"):
        assert metrics["coverage"][key] == mine["coverage"][key], key
    assert sorted(path.name for path in kept.iterdir() if path.suffix) == [
        "metrics.json", "report.html", "report.md", "results.csv",
    ]  # fmt: skip


def test_is_measured_once(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [made / "runs", made / "theirs"]
    compare(given, tmp_path / "page")
    before = (tmp_path / "page" / "compare.json").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(process, "measure", lambda *arguments, **named: pytest.fail("measured again"))
        compare(given, tmp_path / "page")
        (kept,) = (tmp_path / "page" / "measured").iterdir()
        compare([made / "runs", kept], tmp_path / "other")
        assert (tmp_path / "page" / "compare.json").read_text() == before
        assert len(figures(tmp_path / "other")["runs"]) == 4
    calls: list[Any] = []
    original = process.measure

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(0)
        return original(*arguments, **named)

    monkeypatch.setattr(process, "measure", counted)
    shutil.copytree(made / "theirs", tmp_path / "theirs")
    (tmp_path / "theirs" / "NOTES.md").write_text("another checkpoint of the same name")
    compare([made / "runs", tmp_path / "theirs"], tmp_path / "page")
    assert calls == [0]


def test_goes_on_where_it_was_interrupted(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [made / "runs", made / "theirs"]
    with monkeypatch.context() as patch:
        patch.setattr(
            measure.layer_errors, "output_errors", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            compare(given, tmp_path / "page")
    assert not (tmp_path / "page" / "compare.json").exists()
    monkeypatch.setattr(measure.scores, "_compare", lambda *arguments: pytest.fail("all windows were finished"))
    monkeypatch.setattr(measure, "_rounded_inputs", lambda *arguments: None)
    compare(given, tmp_path / "page")
    (kept,) = (tmp_path / "page" / "measured").iterdir()
    assert not [path for path in kept.iterdir() if path.name.endswith(".partial")]


def test_the_model_itself_is_the_baseline(made: Path, tiny_llama: Path, tmp_path: Path) -> None:
    compare([made / "runs" / "tiny" / "int4-g32", tiny_llama], tmp_path / "page")
    assert [run["run"] for run in figures(tmp_path / "page")["runs"]] == ["baseline", "int4-g32"]


def test_an_unquantized_one_goes_by_its_dtype(made: Path, tiny_llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float16)
    model.model.layers[0].mlp.up_proj.weight.data *= 1.01
    model.save_pretrained(tmp_path / "half")
    compare([made / "runs", tmp_path / "half"], tmp_path / "page")
    runs = {run["run"]: run for run in figures(tmp_path / "page")["runs"]}
    assert 0 < runs["float16 half"]["kl_mean"] < runs["int8-channel"]["kl_mean"]
    assert runs["float16 half"]["bits_per_weight"] == 16


def test_the_command_eval_makes_what_compares(made: Path, tiny_llama: Path, tmp_path: Path) -> None:
    asked = ["eval", str(made / "theirs"), "--baseline", str(tiny_llama), "--text", str(made / "text.txt")]
    asked += ["--context", "32", "--windows", "6", "--dtype", "float32"]
    outcome = CliRunner().invoke(app, [*asked, "-o", str(tmp_path / "kept")])
    assert outcome.exit_code == 0, outcome.output
    assert "report: " in outcome.output
    assert "mean KL" in outcome.output
    assert (tmp_path / "kept" / "report.html").exists()
    compare([made / "runs", tmp_path / "kept"], tmp_path / "page")
    assert len(figures(tmp_path / "page")["differences"]) == 3
    again = CliRunner().invoke(app, [*asked, "--windows", "5", "-o", str(tmp_path / "kept")])
    assert again.exit_code == 0, again.output
    assert read_metrics(tmp_path / "kept" / "metrics.json")["protocol"]["windows"] == 5


def test_without_a_baseline_it_is_a_model_of_its_own(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "runs" / "tiny" / "int4-g32" / "artifact", tmp_path / "whole")
    asked = ["eval", str(tmp_path / "whole"), "--text", str(made / "text.txt"), "--context", "32", "--windows", "2"]
    outcome = CliRunner().invoke(app, [*asked, "-o", str(tmp_path / "kept")])
    assert outcome.exit_code == 0, outcome.output
    metrics, mine = read_metrics(tmp_path / "kept" / "metrics.json"), made / "runs" / "tiny" / "none" / "metrics.json"
    assert (metrics["scheme"], metrics["quality"]["kl_mean"]) == ("int4-g32", None)
    assert metrics["model"]["parameters"] == read_metrics(mine)["model"]["parameters"]


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"model": {"id": "another"}}, ConfigError, "runs of one model.*--baseline MODEL -o DIR"),
        ({"protocol": {"name": "gptq-32", "text": "text.txt", "text_sha256": "ab"}}, ConfigError, "hash of the text"),
    ],
)
def test_runs_that_differ_measure_nothing(
    made: Path, tmp_path: Path, change: dict[str, Any], error: type[BitpressError], said: str
) -> None:
    path = tmp_path / "run" / "metrics.json"
    path.parent.mkdir()
    path.write_text(
        json.dumps(sealed({**read_metrics(made / "runs" / "tiny" / "int4-g32" / "metrics.json"), **change}))
    )
    with pytest.raises(error, match=said):
        compare([made / "runs", path, made / "theirs"], tmp_path / "page")
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "the text builtin:pydoc-topics is not what they read"),
        ({"eval": {"text": "TEXT"}}, "their model tiny-llama is not where it was"),
        ({"eval": {"text": "TEXT"}, "models": [{"id": "gone/tiny-llama"}]}, "is not where it was"),
        ({"eval": {"text": "gone.txt"}}, "no such text file"),
        ({"eval": {"sums": 1}}, "unknown key|Extra|not a key"),
    ],
)
def test_what_the_runs_do_not_tell_any_more(made: Path, tmp_path: Path, config: dict[str, Any], said: str) -> None:
    path = tmp_path / "run" / "metrics.json"
    path.parent.mkdir()
    metrics = read_metrics(made / "runs" / "tiny" / "int4-g32" / "metrics.json")
    text = json.dumps({**metrics, "config": config}).replace("TEXT", str(made / "text.txt"))
    path.write_text(json.dumps(sealed(json.loads(text))))
    with pytest.raises(ConfigError, match=f"(?s)theirs cannot be measured like the runs: .*{said}.*--baseline MODEL"):
        compare([path, made / "theirs"], tmp_path / "page")


def test_figures_that_a_checkpoint_brings_count_for_nothing(made: Path, tmp_path: Path) -> None:
    """Those of a run that somebody downloaded with the weights, say: they are as they were written, and not ours."""
    theirs = shutil.copytree(made / "theirs", tmp_path / "theirs")
    flattering = read_metrics(made / "runs" / "tiny" / "none" / "metrics.json")
    flattering["quality"]["perplexity"] = 1.0
    (theirs / "metrics.json").write_text(json.dumps(sealed(flattering)))
    news: list[str] = []
    compare([made / "runs", theirs], tmp_path / "page", say=news.append)
    assert f"{theirs} holds weights, so it is measured: the metrics.json that it brings counts for nothing" in news
    (measured,) = (tmp_path / "page" / "measured").glob("*/metrics.json")
    assert read_metrics(measured)["quality"]["perplexity"] > 1.0
    (tmp_path / "runs").mkdir()
    theirs.rename(tmp_path / "runs" / "theirs")
    with pytest.raises(ConfigError, match="holds no checkpoint and no metrics"):
        compare([tmp_path / "runs"], tmp_path / "page")


def test_figures_of_another_artifact_or_changed_ones_are_refused(made: Path, tmp_path: Path) -> None:
    run = shutil.copytree(made / "runs" / "tiny" / "int4-g32", tmp_path / "run")
    manifest = run / "artifact" / "bitpress.json"
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(ConfigError, match=r"metrics\.json is of another artifact than the one beside it"):
        compare([made / "runs", run], tmp_path / "page")
    path = run / "metrics.json"
    path.write_text(path.read_text().replace('"kl_mean": 0', '"kl_mean": -1'))
    with pytest.raises(CheckpointError, match=r"not as bitpress wrote it, so its figures do not count"):
        compare([made / "runs", run], tmp_path / "page")


def test_alone_it_takes_a_baseline(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is none beside it.*bitpress eval .*theirs --baseline MODEL -o DIR"):
        compare([made / "theirs"], tmp_path / "page")


def test_of_another_vocabulary_is_refused(
    made: Path, tmp_path: Path, save_model: Callable[..., Path], llama_config: Callable[..., Any]
) -> None:
    other = save_model(llama_config(vocab_size=300), tmp_path / "other")
    quantize(other, "int4-g32", tmp_path / "quantized")
    with pytest.raises(
        CheckpointError, match="quantized has a vocabulary of 300 tokens, its baseline tiny-llama one of 256"
    ):
        compare([made / "runs", tmp_path / "quantized"], tmp_path / "page")


def test_figures_of_a_run_are_not_overwritten(made: Path, tiny_llama: Path) -> None:
    asked = ["eval", str(made / "theirs"), "--baseline", str(tiny_llama), "--text", str(made / "text.txt")]
    folder = made / "runs" / "tiny" / "int8-channel"
    before = (folder / "metrics.json").read_bytes()
    outcome = CliRunner().invoke(app, [*asked, "-o", str(folder)])
    assert "was made from something else" in str(outcome.exception)
    assert (folder / "metrics.json").read_bytes() == before
