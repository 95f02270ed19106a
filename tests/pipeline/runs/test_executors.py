"""Executors' options, and what of the one on Ray needs no cluster; tests/scenarios/test_ray.py has the rest."""

import threading
from pathlib import Path
from typing import Any

import pytest

from bitpress.pipeline.errors import ConfigError, LockedError
from bitpress.pipeline.runs.executors import executor
from bitpress.pipeline.runs.executors.ray import Board, Ray, _tokens, _unplaceable
from bitpress.pipeline.storage import journal
from bitpress.pipeline.system.progress import progress, reported


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("ray", {"adress": "auto"}, "executor_options.adress: ray has no such option; did you mean address?"),
        ("ray", {"cpus": 0}, "executor_options.cpus: Input should be greater than or equal to 1, got 0"),
        (
            "ray",
            {"storage": "nfs"},
            "executor_options.storage: Input should be",
        ),
        ("serial", {"cpus": 2}, "executor_options.cpus: serial has no such option; it has none"),
    ],
)
def test_options_are_checked(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        executor(name, options)
    assert said in str(caught.value)


def test_options_take_the_place_of_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    chosen = executor("ray", {"address": "auto", "cpus": 4})
    assert isinstance(chosen, Ray)
    assert (chosen.cpus, chosen.retries, chosen.elsewhere) == (4, 3, True)
    assert not executor("ray").elsewhere
    assert not executor("serial").elsewhere


def test_a_job_that_no_node_has_room_for_is_refused() -> None:
    nodes = [{"CPU": 8, "memory": 16e9}, {"CPU": 2, "GPU": 1, "memory": 64e9}]
    assert _unplaceable({"CPU": 2, "GPU": 1, "memory": 50e9}, nodes) is None
    reason = _unplaceable({"CPU": 4, "GPU": 1, "memory": 1e9}, nodes)
    assert reason is not None
    assert reason.startswith("it needs 4 CPUs, 1 GPUs and 1.00 GB, and no node of the cluster has that (8 CPUs, 0 GPUs")


def test_files_go_to_a_worker_and_come_back(tmp_path: Path) -> None:
    """A worker that is lost in the middle leaves the folder as it was; another takes up the loan."""
    board, folder = Board(), tmp_path / "run" / "int4-g32"
    (folder.parent / "none").mkdir(parents=True)
    (folder.parent / "none" / "metrics.json").write_text("{}")
    folder.mkdir()
    (folder / "journal.jsonl").write_text("old")
    assert board.lend(folder) == ["journal.jsonl", "../none/metrics.json"]
    with pytest.raises(LockedError), journal.locked(folder):
        pass
    assert board.read(folder / "journal.jsonl", 1) == b"ld"
    board.write(folder, "artifact/model", 0, b"half")
    assert board.lend(folder) == ["journal.jsonl", "../none/metrics.json"]
    board.write(folder, "artifact/model", 0, b"whole")
    board.write(folder, "artifact/model", 5, b" file")
    board.give_back(folder, True)
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*")} == {"artifact", "artifact/model"}
    assert (folder / "artifact" / "model").read_text() == "whole file"
    board.lend(folder)
    board.write(folder, "artifact/model", 0, b"half")
    board.give_back(folder, False)
    assert (folder / "artifact" / "model").read_text() == "whole file"
    assert [path.name for path in sorted(folder.parent.iterdir())] == ["int4-g32", "none"]
    with journal.locked(folder):
        pass


def test_the_board_keeps_news_and_the_last_state() -> None:
    board = Board()
    board.tell(1, "quantize by gptq")
    board.show(1, {"label": "quantizing", "done": 1, "total": 9})
    board.show(1, {"done": 2})
    news, states = board.take()
    assert news == [(1, "quantize by gptq")]
    assert states == {1: {"line": "quantize by gptq", "label": "quantizing", "done": 2, "total": 9}}
    assert board.take()[0] == []


def test_a_token_shows_a_shared_disk_as_long_as_it_is_needed(tmp_path: Path) -> None:
    with _tokens() as token_of:
        assert token_of(tmp_path) == token_of(tmp_path)
        assert Path(token_of(tmp_path)).exists()
    assert not list(tmp_path.iterdir())


def test_progress_is_reported() -> None:
    seen: list[tuple[str, int, int]] = []
    with reported(lambda *step: seen.append(step)), progress("quantizing") as step:
        step(1, 9)
    with progress("not told") as step:
        step(1, 9)
    assert seen == [("quantizing", 1, 9)]


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    """Its holder ends after a while, as a lost worker does."""
    held, ending = threading.Event(), threading.Event()

    def hold() -> None:
        with journal.locked(tmp_path):
            held.set()
            ending.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(10)
    with pytest.raises(LockedError), journal.locked(tmp_path, 0.2):
        pass
    ending.set()
    with journal.locked(tmp_path, 10):
        holder.join()
