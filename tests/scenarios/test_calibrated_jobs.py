"""From the settings of a job to its recipe, with a method that needs calibration."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from bitpress.pipeline import api
from bitpress.pipeline.config.schema import Run
from bitpress.pipeline.errors import ConfigError, NumericsError
from bitpress.pipeline.evaluate import process
from bitpress.pipeline.quantize.recipe import Recipe, fingerprint
from bitpress.pipeline.runs import job
from bitpress.pipeline.runs import run as runner
from bitpress.pipeline.storage.checkpoint import Checkpoint

TEXT = "".join(f"{number} bottles of beer" for number in range(100, 400))
pytestmark = pytest.mark.usefixtures("student")


def write(folder: Path, name: str, content: str) -> str:
    (folder / name).write_text(content)
    return str(folder / name)


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Recipe]]:
    """The recipes that the quantize stage was given, which stops there; so does what measures the baseline."""
    found: list[Recipe] = []

    def refuse(*arguments: Any) -> dict[str, Any]:
        raise NumericsError("nothing is measured")

    def stop(checkpoint: Checkpoint, source: dict[str, Any], recipe: Recipe, *arguments: Any) -> list[str]:
        found.append(recipe)
        raise NumericsError("stopped here")

    monkeypatch.setattr(api, "quantize_checkpoint", stop)
    monkeypatch.setattr(job, "quantize", stop)
    monkeypatch.setattr(process, "measure", refuse)
    return found


@pytest.fixture
def text(tmp_path: Path) -> str:
    return write(tmp_path, "a.txt", TEXT)


def run(tmp_path: Path, model: Path, text: str, **defaults: Any) -> list[runner.Outcome]:
    chosen = {"name": "trial", "models": [{"id": str(model)}], "recipes": ["int4-g32", "int8-g32"], "device": "cpu"}
    chosen["eval"] = {"text": text, "context": 64, "windows": 2, "speed": None}
    return runner.execute(Run(**chosen, defaults=defaults, output=str(tmp_path / "runs")), "", print)


def test_api(tmp_path, tiny_llama, text, recipes):
    recipe = {"method": "student", "scheme": "int4-g32", "options": {"damping": 0.5}, "max_fallback_layers": 3}
    recipe["calibration"] = {"text": text, "windows": 2}
    with pytest.raises(NumericsError, match="stopped here"):
        api.quantize(tiny_llama, recipe, tmp_path / "out")
    assert recipes[0].calibration.ids.shape == (2, 256)
    assert recipes[0].max_fallback_layers == 3
    fields = fingerprint(Checkpoint(tiny_llama), {}, recipes[0])
    assert fields["quantize.calibration.sha256"] == recipes[0].calibration.to_dict()["sha256"]
    assert (fields["quantize.calibration.seed"], fields["quantize.student.damping"]) == (0, 0.5)


def test_api_takes_a_source_by_itself(tmp_path, tiny_llama, recipes):
    path = write(tmp_path, "b.txt", TEXT * 10)
    with pytest.raises(NumericsError, match="stopped here"):
        api.quantize(tiny_llama, {"method": "student", "scheme": "int4-g32", "calibration": path}, tmp_path / "out")
    assert recipes[0].calibration.ids.shape == (128, 256)


def test_api_without_need_of_it(tmp_path, tiny_llama, text, recipes):
    for method in ("auto", "absmax"):
        with pytest.raises(ConfigError, match="no method of the recipe is calibrated"):
            api.quantize(tiny_llama, {"method": method, "scheme": "int4-g32", "calibration": text}, tmp_path / "out")
    assert not recipes


@pytest.mark.parametrize("content", ["", "short", "a" * 9999])
def test_refused_before_a_weight_is_read(tmp_path, tiny_llama, refused_early, monkeypatch, content):
    def read(*arguments: Any) -> Tensor:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "read", read)
    settings = {"text": write(tmp_path, "b.txt", content), "windows": 2, "context": 64}
    refused_early(tiny_llama, "b.txt", NumericsError, method="student", calibration=settings)


def test_run_reads_the_text_once_for_all_schemes(tmp_path, tiny_llama, text, recipes, capsys):
    calibration = {"text": text, "windows": 3, "context": 32, "seed": None}
    run(tmp_path, tiny_llama, text, method="student", calibration=calibration, max_fallback_layers=1)
    assert [recipe.scheme for recipe in recipes] == ["int4-g32", "int8-g32"]
    assert recipes[0].calibration is recipes[1].calibration
    assert recipes[0].calibration.ids.shape == (3, 32)
    assert recipes[0].max_fallback_layers == 1
    said = capsys.readouterr().out
    assert "quantize by student, calibrated on a.txt: 3 windows of 32 tokens" in said
    assert "a.txt is also what is measured, so the figures will flatter" in said


def test_run_refuses_before_it_begins(tmp_path, tiny_llama, text, recipes):
    calibration = {"text": text, "windows": 1000, "context": 64}
    outcomes = run(tmp_path, tiny_llama, text, method="student", calibration=calibration)
    assert len(outcomes) == 3, "the baseline and two schemes"
    assert all("calibration needs 64000" in str(outcome.error) for outcome in outcomes)
    assert not recipes
    assert not (tmp_path / "runs").exists()


def test_run_without_need_of_it(tmp_path, tiny_llama, text, recipes):
    run(tmp_path, tiny_llama, text, method="absmax", calibration={"text": "gone.txt"})
    assert [recipe.calibration for recipe in recipes] == [None, None]
