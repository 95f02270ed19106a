"""The file of packed weights: whole or not there, and nothing is taken from it that its header does not bear out."""

import errno
import hashlib
import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpress.pipeline.errors import ConfigError, DiskError
from bitpress.pipeline.storage import files
from bitpress.pipeline.storage.packed_file import (
    _FOOTER,
    PackedFile,
    PackedFileError,
    packed_files,
    place_to_write,
    remove_packed,
    write_packed,
)

TENSORS = {
    "codes": torch.arange(1000, dtype=torch.uint8),
    "norm": torch.linspace(-1, 1, 33, dtype=torch.bfloat16),
    "none": torch.empty(0, 4),
    "order": torch.arange(6, dtype=torch.int32).view(2, 3),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_packed(tmp_path / "a.packed", {"key": 1}, TENSORS)
    return tmp_path / "a.packed"


def header_of(path: Path) -> dict[str, Any]:
    """The header as it is written, "tensors" among it."""
    content = path.read_bytes()
    start, length, _, _ = _FOOTER.unpack(content[-_FOOTER.size :])
    return dict(json.loads(content[start : start + length]))


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The header changed, and its place and hash made to fit it: what somebody writes who means harm."""
    content = path.read_bytes()
    start, _, _, magic = _FOOTER.unpack(content[-_FOOTER.size :])
    header = header_of(path)
    changed = change(header)
    text = json.dumps(header if changed is None else changed).encode()
    path.write_bytes(content[:start] + text + _FOOTER.pack(start, len(text), hashlib.sha256(text).digest(), magic))


def test_what_is_written_is_mapped(path: Path) -> None:
    file = PackedFile(path)
    assert file.header["key"] == 1
    for name, tensor in TENSORS.items():
        mapped = file.tensor(name)
        assert mapped.dtype == tensor.dtype
        assert torch.equal(mapped, tensor)
        assert mapped.data_ptr() % 128 == 0
    assert file.nbytes == path.stat().st_size
    assert not file.damaged()
    file.tensor("codes").fill_(7)  # for this process alone
    assert torch.equal(PackedFile(path).tensor("codes"), TENSORS["codes"])


def test_damage_among_the_tensors(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    assert PackedFile(path).damaged()


@pytest.mark.parametrize("left", [0, 100, 184, 1000, -1, -57])
def test_truncated(path: Path, left: int) -> None:
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(PackedFileError, match="truncated"):
        PackedFile(path)


@pytest.mark.parametrize("at", range(_FOOTER.size))
def test_every_byte_of_the_footer_counts(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at - _FOOTER.size] ^= 0x41
    path.write_bytes(content)
    with pytest.raises(PackedFileError):
        PackedFile(path)


def entry(**change: Any) -> Callable[[dict[str, Any]], None]:
    def apply(header: dict[str, Any]) -> None:
        dtype, shape, offset = header["tensors"]["codes"]
        parts = {"dtype": dtype, "shape": shape, "offset": offset} | change
        header["tensors"]["codes"] = list(parts.values())

    return apply


@pytest.mark.parametrize(
    "change",
    [
        entry(offset=129),
        entry(offset=-128),
        entry(offset=1 << 40),
        entry(offset=1.0),
        entry(offset=True),
        entry(shape=[1 << 62, 4]),
        entry(shape=[-1000]),
        entry(shape=[1 << 20]),
        entry(shape=["8"]),
        entry(shape=7),
        entry(dtype="torch.int64"),
        entry(dtype="torch.complex64"),
        entry(dtype=None),
        entry(more=1),
        lambda header: header.pop("tensors"),
        lambda header: header.update(tensors=[1]),
        lambda header: [1],
        lambda header: "text",
    ],
)
def test_headers_that_somebody_made_up(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    rewrite(path, lambda header: change(header) if callable(change) else None)
    with pytest.raises(PackedFileError):
        PackedFile(path)


def test_files_that_others_can_change(path: Path) -> None:
    path.chmod(0o664)
    with pytest.raises(PackedFileError, match="not this user's alone"):
        PackedFile(path)
    path.chmod(0o644)
    (link := path.with_name("b.packed")).symlink_to(path)
    with pytest.raises(PackedFileError, match="cannot be opened"):
        PackedFile(link)
    os.mkfifo(fifo := path.with_name("c.packed"))
    with pytest.raises(PackedFileError, match="no regular file"):
        PackedFile(fifo)


def test_killed_at_every_write_sync_and_rename(tmp_path: Path, die_at: Callable[[int], None]) -> None:
    """Nothing, or the whole file; and the next one writes it."""
    path, call, killed = tmp_path / "a.packed", 0, True
    while killed:
        call += 1
        path.unlink(missing_ok=True)
        if (child := os.fork()) == 0:
            die_at(call)
            write_packed(path, {}, TENSORS)
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert not path.exists() or not PackedFile(path).damaged()
    assert call > 4
    assert path.exists()
    write_packed(path, {}, TENSORS)
    assert {each.name for each in tmp_path.iterdir()} == {"a.packed", files.LOCK}


def test_two_writers(path: Path) -> None:
    """One after the other; whoever maps the first goes on with it."""
    before = PackedFile(path)
    with ThreadPoolExecutor(2) as executor:
        list(executor.map(lambda value: write_packed(path, {"key": value}, TENSORS), (2, 3)))
    assert PackedFile(path).header["key"] in (2, 3)
    assert not PackedFile(path).damaged()
    assert torch.equal(before.tensor("codes"), TENSORS["codes"])


def test_disk_full(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(DiskError, match="the disk is full"):
        write_packed(path, {"key": 2}, TENSORS)
    assert PackedFile(path).header["key"] == 1


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    model.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: model not in Path(path).parents and allowed(path, mode))
    with pytest.raises(ConfigError, match=r"model cannot be written to.*--user-cache"):
        place_to_write(model)
    place = place_to_write(model, user_cache=True)
    write_packed(place / "a.packed", {}, TENSORS)
    assert packed_files(model) == [place / "a.packed"]
    assert place in remove_packed(model)
    assert packed_files(model) == []
