"""What follows from headers is worked out once, and again as soon as something that it depends on has changed."""

from pathlib import Path
from typing import Any

import pytest

from bitpress.pipeline.system import remembered as module
from bitpress.pipeline.system.remembered import remembered


class Answer:
    """Counts how often it is asked."""

    def __init__(self, value: Any = 1):
        self.asked, self.value = 0, value

    def __call__(self) -> dict[str, Any]:
        self.asked += 1
        return {"value": self.value}

    def __matmul__(self, key: Any) -> dict[str, Any]:
        return remembered("question", {"key": key}, self, keep=lambda answer: answer["value"] is not None)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def test_an_answer_is_worked_out_once(cache: Path) -> None:
    answer = Answer()
    assert [answer @ "a", answer @ "a", answer @ "b"] == [{"value": 1}] * 3
    assert answer.asked == 2


def test_other_programs_give_other_answers(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Answer()
    answer @ "a"
    monkeypatch.setattr(module, "programs", lambda: {"transformers": "99"})
    answer @ "a"
    assert answer.asked == 2


def test_what_is_not_to_be_kept_is_not(cache: Path) -> None:
    answer = Answer(None)
    answer @ "a"
    answer @ "a"
    assert answer.asked == 2
    assert not cache.exists()


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"key": "of something else", "answer": {"value": 2}}'])
def test_a_damaged_file_is_as_good_as_none(cache: Path, damage: str) -> None:
    answer = Answer()
    answer @ "a"
    for path in cache.iterdir():
        path.write_text(damage)
    assert answer @ "a" == {"value": 1}
    assert answer.asked == 2


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(module, "folder", lambda: tmp_path / "file" / "cache")
    assert Answer() @ "a" == {"value": 1}


def test_the_oldest_answers_go(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 3)
    answer = Answer()
    for number in range(5):
        answer @ number
    assert len(list(cache.iterdir())) == 3
    answer @ 4
    assert answer.asked == 5
