"""Windows on the disk: what was committed comes back to the bit, wherever the process died, and nothing else does."""

import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from bitpress.pipeline.errors import ConfigError
from bitpress.pipeline.evaluate import resume
from bitpress.pipeline.evaluate.resume import WindowStore

FINGERPRINT = {"text.sha256": "ab", "eval.context": "8"}


def found(number):
    """Of three kinds of numbers, another count in each window."""
    generator = torch.Generator().manual_seed(number)
    count = 3 + number
    return {
        "nll": torch.randn(count, generator=generator),
        "same": torch.rand(count, generator=generator) > 0.5,
        "top": torch.randint(1000, (count, 4), dtype=torch.int32, generator=generator),
    }


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "evaluation.partial"


@pytest.fixture
def at_once(monkeypatch):
    """Each window is committed by itself."""
    monkeypatch.setattr(resume, "_SECONDS", -1.0)


def test_what_is_kept_comes_back(folder):
    with WindowStore(folder, FINGERPRINT) as kept:
        assert not kept
        for number in (0, 1, 5):
            kept.keep(number, found(number))
        assert equal(kept[5], found(5))  # before it is on the disk, too
    again = WindowStore(folder, FINGERPRINT)
    assert sorted(again) == [0, 1, 5]
    assert all(equal(again[number], found(number)) for number in again)
    assert again.get(2) is None


def test_windows_are_committed_in_time_and_together(folder, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(resume.time, "monotonic", lambda: now[0])
    kept = WindowStore(folder, FINGERPRINT)
    for number in range(7):
        now[0] += 0.4
        kept.keep(number, found(number))
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    assert [line["windows"] for line in lines] == [[0, 1, 2], [3, 4, 5]]  # a second's work each; the last is not yet


@pytest.mark.usefixtures("at_once")
def test_killed_at_every_write_sync_and_rename(tmp_path, die_at):
    """Whatever was committed is there; the next process adds the rest and ends with all."""

    def work(folder):
        with WindowStore(folder, FINGERPRINT) as kept:
            for number in range(3):
                if number not in kept:
                    kept.keep(number, found(number))

    counts = set()
    for call in itertools.count(1):
        folder = tmp_path / str(call)
        if (child := os.fork()) == 0:
            die_at(call)
            work(folder)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        counts.add(len(WindowStore(folder, FINGERPRINT)))
        work(folder)
        again = WindowStore(folder, FINGERPRINT)
        assert sorted(again) == [0, 1, 2]
        assert all(equal(again[number], found(number)) for number in again)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert counts == {0, 1, 2, 3}


def test_an_exception_keeps_what_was_finished(folder, monkeypatch):
    monkeypatch.setattr(resume, "_SECONDS", 1e9)

    def work():
        with WindowStore(folder, FINGERPRINT) as kept:
            kept.keep(0, found(0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert list(WindowStore(folder, FINGERPRINT)) == [0]


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?")])
def test_a_damaged_file_is_as_if_it_had_never_been(folder, damage):
    with WindowStore(folder, FINGERPRINT) as kept:
        for number in range(3):
            kept.keep(number, found(number))
    damage(sorted(folder.glob("*.safetensors"))[1])
    with WindowStore(folder, FINGERPRINT) as again:
        assert sorted(again) == [0, 2]
        again.keep(1, found(1))
    assert equal(WindowStore(folder, FINGERPRINT)[1], found(1))


def test_of_something_else_is_refused_by_name(folder):
    WindowStore(folder, FINGERPRINT)
    with pytest.raises(ConfigError, match=r"eval\.context: was '8', is '16'"):
        WindowStore(folder, FINGERPRINT | {"eval.context": "16"})


def test_a_damaged_journal_is_refused(folder):
    with WindowStore(folder, FINGERPRINT) as kept:
        kept.keep(0, found(0))
    journal = folder / "journal.jsonl"
    journal.write_text(journal.read_text().replace("[0]", "[1]"))
    with pytest.raises(ConfigError, match="line 1 is not as it was written"):
        WindowStore(folder, FINGERPRINT)
    shutil.rmtree(folder)
    assert not WindowStore(folder, FINGERPRINT)
