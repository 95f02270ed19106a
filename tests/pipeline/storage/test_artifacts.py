"""A path means a checkpoint, or the run that made one."""

from pathlib import Path

import pytest

from bitpress.pipeline.errors import ConfigError
from bitpress.pipeline.storage.artifacts import local_checkpoint


def artifact(run: Path) -> Path:
    (run / "artifact").mkdir(parents=True)
    (run / "artifact" / "model.safetensors").touch()
    (run / "metrics.json").touch()
    return run / "artifact"


def test_a_recipes_folder_means_its_artifact(tmp_path: Path):
    own = artifact(tmp_path / "demo" / "int4-g128")
    assert local_checkpoint(tmp_path / "demo" / "int4-g128") == local_checkpoint(own) == own
    assert local_checkpoint(tmp_path / "demo") == own  # its only one


def test_a_run_of_several_recipes_names_them(tmp_path: Path):
    artifact(tmp_path / "demo" / "org--model" / "int4-g128")
    artifact(tmp_path / "demo" / "org--model" / "nf4")
    with pytest.raises(ConfigError, match=r"a run of 2 recipes; name one of them:\n.*int4-g128\n.*nf4"):
        local_checkpoint(tmp_path / "demo")


def test_a_baseline_has_no_weights(tmp_path: Path):
    (tmp_path / "metrics.json").touch()
    with pytest.raises(ConfigError, match="holds figures and no weights; name the model itself"):
        local_checkpoint(tmp_path)


def test_other_paths_mean_themselves(tmp_path: Path):
    assert local_checkpoint(tmp_path) == tmp_path
    assert local_checkpoint(tmp_path / "gone") == tmp_path / "gone"
    assert (local_checkpoint("builtin:demo") / "config.json").is_file()
