"""No command, no process that it starts and no compiler takes code from the folder in which it was started."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bitpress.pipeline.bench import cost, programs
from bitpress.pipeline.evaluate.worker import call
from bitpress.pipeline.system import children, program

POISON = """
import os
open(os.environ["CANARY"], "a").write(__name__ + "\\n")
"""
MODULES = (
    "torch", "random", "json", "transformers", "sitecustomize", "usercustomize", "triton", "numpy", "typer", "typing",
    "difflib", "signal", "psutil", "matplotlib", "safetensors", "gptqmodel", "llama_cpp", "lm_eval",
)  # fmt: skip
# What a shell's variables often have: an entry that is empty, or this folder
SEARCHED = {"PYTHONPATH": "", "PATH": ".", "LIBRARY_PATH": "", "CPATH": "."}


@pytest.fixture
def poisoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, full of modules and programs that leave a trace; a canary's file gets their names."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name in MODULES:
        (folder / f"{name}.py").write_text(POISON)
    for name in ("cc", "gcc", "clang"):
        (folder / name).write_text('#!/bin/sh\necho "$0" >> "$CANARY"\nexit 1\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    for name, entry in SEARCHED.items():
        monkeypatch.setenv(name, os.pathsep.join(filter(None, [os.environ.get(name)])) + os.pathsep + entry)
    monkeypatch.chdir(folder)
    return folder


def traces(tmp_path: Path) -> list[str]:
    canary = tmp_path / "canary"
    return canary.read_text().splitlines() if canary.exists() else []


SCRIPT = "import sys\nfrom bitpress.pipeline.cli.app import main\nsys.exit(main())\n"
START = {"module": ["-m", "bitpress.pipeline.cli"], "code": ["-c", SCRIPT], "script": ["bitpress"]}


@pytest.mark.parametrize(("how", "led_astray"), [*((how, False) for how in START), ("script", True)])
def test_commands(
    how: str, led_astray: bool, poisoned: Path, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
):
    """Where an entry of PYTHONPATH leads to this folder, Python itself imports from it before there is any of us."""
    if not led_astray:
        monkeypatch.setenv("PYTHONPATH", os.environ["PYTHONPATH"].strip(os.pathsep))
    script = tmp_path / "bin" / "bitpress"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    command = [sys.executable, *(str(script) if word == "bitpress" else word for word in START[how])]
    outcome = subprocess.run([*command, "inspect", str(tiny_llama)], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    assert set(traces(tmp_path)) <= ({"sitecustomize", "usercustomize"} if led_astray else set())


@pytest.mark.usefixtures("poisoned")
def test_the_measuring_process(tmp_path: Path, tiny_llama: Path):
    request: dict[str, Any] = {"artifact": str(tiny_llama), "eval": {"text": "gone.txt"}, "device": "cpu", "folder": ""}
    with pytest.raises(Exception, match=r"gone\.txt"):  # it has imported all, and loaded the model
        call("measure", request)
    assert traces(tmp_path) == []


@pytest.mark.usefixtures("poisoned")
def test_another_program(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text("import random, json, sys, os; print(os.getcwd())")
    with (tmp_path / "log").open("wb") as log:
        assert cost.measured([sys.executable, str(script)], log)[0] == 0
    assert "theirs" not in (tmp_path / "log").read_text()
    assert traces(tmp_path) == []


def test_a_program_that_only_lies_here_is_not_installed(poisoned: Path, tmp_path: Path):
    (poisoned / "only_here.py").write_text(POISON)
    other = tmp_path / "python"  # not sys.executable, so that it is asked
    other.symlink_to(sys.executable)
    assert not programs.Program("x", "only_here", poisoned / "script.py", str(other)).installed()


class TestEnvironment:
    def test_what_depends_on_the_folder_goes(self):
        cleaned = program.clean_environment(
            {"PATH": ":/bin:.:x/y", "PYTHONPATH": ":", "LD_LIBRARY_PATH": "/lib:", "A": "."}
        )
        assert cleaned == {"PATH": "/bin", "LD_LIBRARY_PATH": "/lib", "A": "."}

    def test_caches_keep_their_places(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        cleaned = program.clean_environment({"HF_HOME": "cache", "TRITON_CACHE_DIR": "/t", "TORCH_HOME": "~/t"})
        assert cleaned == {"HF_HOME": str(tmp_path / "cache"), "TRITON_CACHE_DIR": "/t", "TORCH_HOME": "~/t"}

    def test_what_is_named_in_full_is_the_users_choice(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", ["", ".", str(tmp_path), *sys.path])
        program.leave_current_folder()
        assert not {"", ".", str(tmp_path)} & set(sys.path)
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        program.leave_current_folder()
        assert sys.path[0] == str(tmp_path)

    @pytest.mark.parametrize(("chosen", "used"), [(None, "NO"), ("YES", "YES")])
    def test_kernels_of_the_hub_are_the_users_choice(
        self, chosen: str | None, used: str, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setenv("USE_HUB_KERNELS", chosen or "")
        if chosen is None:
            monkeypatch.delenv("USE_HUB_KERNELS")
        program.leave_current_folder()
        assert os.environ["USE_HUB_KERNELS"] == used

    def test_a_library_leaves_the_path_alone(self, tmp_path: Path):
        code = (
            "import sys; before = list(sys.path); import bitpress.pipeline; assert sys.path == before and '' in before"
        )
        subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_what_is_started_ends_with_the_block():
    with children.private_folder() as folder:
        with children.start(["sleep", "60"], folder) as process:
            assert folder.stat().st_mode & 0o777 == 0o700
        assert process.returncode == -9
    assert not folder.exists()
