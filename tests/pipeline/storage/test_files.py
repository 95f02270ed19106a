"""Files appear whole or not at all; locks free themselves; a full disk costs nothing that was finished."""

import errno
import hashlib
import os
import resource
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from bitpress.pipeline.api import quantize
from bitpress.pipeline.errors import BitpressError, ConfigError, DiskError, LockedError
from bitpress.pipeline.storage import files, journal

SCHEME = "int4-g32"


def failing(calls: int, code: int = errno.ENOSPC) -> Callable[[int, bytes], int]:
    """os.write, which fails from a call on."""
    count = 0

    def write(descriptor: int, data: bytes) -> int:
        nonlocal count
        count += 1
        if count >= calls:
            raise OSError(code, os.strerror(code))
        return os.write(descriptor, data)

    return write


class TestWriteFile:
    def test_returns_size_and_hash(self, tmp_path: Path):
        found = files.write_file(tmp_path / "a", [b"one", memoryview(b"two"), b""])
        assert found == {"bytes": 6, "sha256": hashlib.sha256(b"onetwo").hexdigest()}
        assert (tmp_path / "a").read_bytes() == b"onetwo"

    @pytest.mark.parametrize("sizes", [[0], [1, files.CHUNK], [files.CHUNK - 1, 2, files.CHUNK + 1], [3 * files.CHUNK]])
    def test_pieces_keep_order(self, tmp_path: Path, sizes: list[int]):
        chunks = [bytes([number + 1]) * size for number, size in enumerate(sizes)]
        files.write_file(tmp_path / "a", chunks)
        assert (tmp_path / "a").read_bytes() == b"".join(chunks)

    @pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
    def test_mode_follows_umask(self, tmp_path: Path, umask: int):
        was = os.umask(umask)
        try:
            files.write_safetensors(tmp_path / "a", {"w": torch.zeros(2)})
        finally:
            os.umask(was)
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask

    @pytest.mark.parametrize("step", ["write", "fsync", "replace"])
    def test_killed_before_any_step_leaves_the_old_file(self, tmp_path: Path, step: str):
        path = tmp_path / "a"
        path.write_bytes(b"old")
        if (child := os.fork()) == 0:
            setattr(files, step, lambda *arguments: os.kill(os.getpid(), signal.SIGKILL))
            files.write_file(path, [b"new"])
            os._exit(1)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        assert path.read_bytes() == b"old"
        files.write_file(path, [b"new"])
        assert [p.name for p in tmp_path.iterdir()] == ["a"]
        assert path.read_bytes() == b"new"

    def test_full_disk_leaves_the_old_file_and_nothing_else(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digests: Callable[[Path], dict[str, str]]
    ):
        path = tmp_path / "a"
        path.write_bytes(b"old")
        monkeypatch.setattr(files, "write", failing(2))
        with pytest.raises(DiskError, match="disk is full"):
            files.write_file(path, [b"x" * files.CHUNK, b"y"])
        assert digests(tmp_path) == {"a": hashlib.sha256(b"old").hexdigest()}

    def test_replaces_a_link_rather_than_what_it_points_to(self, tmp_path: Path):
        (tmp_path / "elsewhere").write_text("mine")
        (tmp_path / "a").symlink_to(tmp_path / "elsewhere")
        files.write_text(tmp_path / "a", "new")
        assert (tmp_path / "elsewhere").read_text() == "mine"
        assert not (tmp_path / "a").is_symlink()

    def test_json_refuses_nan(self, tmp_path: Path):
        with pytest.raises(ValueError, match="JSON compliant"):
            files.write_json(tmp_path / "a", {"x": float("nan")})
        assert not list(tmp_path.iterdir())


class TestSafetensors:
    def test_every_dtype_and_odd_shapes_read_back_equal(self, tmp_path: Path):
        tensors = {}
        for name, dtype in files.SAFETENSORS_DTYPES.items():
            values = torch.arange(6).reshape(2, 3).to(dtype)
            tensors |= {f"{name}.matrix": values, f"{name}.scalar": values[1, 2].clone()}
            tensors |= {f"{name}.empty": values[:0].clone(), f"{name}.one": values[:1, :1].clone()}
        tensors["transposed"] = torch.arange(6.0).reshape(2, 3).t()
        files.write_safetensors(tmp_path / "a.safetensors", tensors)
        found = load_file(tmp_path / "a.safetensors")
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert found[name].shape == tensor.shape
            assert torch.equal(found[name], tensor), name

    def test_same_tensors_same_bytes_in_any_order(self, tmp_path: Path):
        tensors = {"b": torch.ones(3), "a": torch.zeros(2, 2, dtype=torch.bfloat16), "c": torch.tensor(1)}
        first = files.write_safetensors(tmp_path / "1", tensors)
        second = files.write_safetensors(tmp_path / "2", dict(reversed(tensors.items())))
        assert first == second

    def test_no_tensors(self, tmp_path: Path):
        files.write_safetensors(tmp_path / "a", {})
        assert load_file(tmp_path / "a") == {}


class TestJournal:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        made = journal.Journal(tmp_path / "journal.jsonl")
        for number in range(3):
            made.append({"number": number, "error": 0.1 + number, "name": "ü"})
        return made.path

    def test_reads_back_what_was_appended(self, path: Path):
        assert [entry["error"] for entry in journal.Journal(path).entries] == [0.1, 1.1, 2.1]

    def test_torn_tail_is_dropped_wherever_it_is_torn(self, path: Path):
        data = path.read_bytes()
        start = data.rstrip(b"\n").rfind(b"\n") + 1
        for cut in range(start, len(data)):
            path.write_bytes(data[:cut])
            again = journal.Journal(path)
            assert len(again.entries) == 2
            again.append({"number": 9})
            assert [entry["number"] for entry in journal.Journal(path).entries] == [0, 1, 9]

    @pytest.mark.parametrize("damage", [b"\x00", b"}", b"7", b"\n"])
    def test_damaged_middle_is_refused(self, path: Path, damage: bytes):
        data = path.read_bytes()
        middle = data.index(b"1.1")
        path.write_bytes(data[:middle] + damage + data[middle + 1 :])
        with pytest.raises(ConfigError, match=r"line 2 is not as it was written.*move .* away"):
            journal.Journal(path)
        assert len(path.read_bytes()) == len(data)

    @pytest.mark.parametrize("line", [b"[]", b"null", b"{}", b'"x"', b"\xff\xfe"])
    def test_foreign_lines_are_refused(self, path: Path, line: bytes):
        path.write_bytes(line + b"\n" + path.read_bytes())
        with pytest.raises(ConfigError, match="line 1"):
            journal.Journal(path)


class TestLock:
    def test_second_holder_is_refused_by_name_and_the_lock_dies_with_its_holder(self, tmp_path: Path):
        held, tell = os.pipe()
        if (holder := os.fork()) == 0:
            with journal.locked(tmp_path):
                os.write(tell, b"held")
                signal.pause()
        try:
            assert os.read(held, 4) == b"held"
            with pytest.raises(LockedError, match=f"in use by process {holder} on "), journal.locked(tmp_path):
                pass
            assert os.waitpid(holder, os.WNOHANG) == (0, 0)  # the first is unharmed
        finally:
            os.kill(holder, signal.SIGKILL)
            os.waitpid(holder, 0)
        with journal.locked(tmp_path):
            pass

    def test_quantize_refuses_a_folder_that_is_held(self, tmp_path: Path, tiny_llama: Path):
        work = tmp_path / "out.partial"
        work.mkdir()
        with journal.locked(work), pytest.raises(LockedError) as caught:
            quantize(tiny_llama, SCHEME, tmp_path / "out")
        assert caught.value.exit_code == 7
        assert f"process {os.getpid()}" in str(caught.value)


class TestFullDisk:
    def test_file_size_limit_in_a_child_then_a_run_that_finishes(
        self, tmp_path: Path, tiny_llama: Path, digests: Callable[[Path], dict[str, str]]
    ):
        """RLIMIT_FSIZE stands in for a disk that is full: the kernel, not a patch, refuses the write."""
        if (child := os.fork()) == 0:
            torch.set_num_threads(1)
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
            try:
                quantize(tiny_llama, SCHEME, tmp_path / "out")
            except DiskError as error:
                os._exit(error.exit_code if "disk is full" in str(error) else 98)
            os._exit(99)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.rglob("*.tmp*.tmp"))
        quantize(tiny_llama, SCHEME, tmp_path / "out")
        quantize(tiny_llama, SCHEME, tmp_path / "unbroken")
        assert digests(tmp_path / "out") == digests(tmp_path / "unbroken")

    def test_full_at_any_write(
        self,
        tmp_path: Path,
        tiny_llama: Path,
        monkeypatch: pytest.MonkeyPatch,
        digests: Callable[[Path], dict[str, str]],
    ):
        quantize(tiny_llama, SCHEME, tmp_path / "unbroken")
        out, call = tmp_path / "out", 0
        while not out.exists():
            call += 1
            with monkeypatch.context() as patch:
                patch.setattr(files, "write", failing(call))
                try:
                    quantize(tiny_llama, SCHEME, out)
                except DiskError as error:
                    assert error.exit_code == 5  # noqa: PT017
                    assert not out.exists()
                    half = [path for path in tmp_path.rglob(".*.tmp") if path.is_file()]
                    assert not half
        assert call > 4  # and each rerun went on from where the one before was stopped
        assert digests(out) == digests(tmp_path / "unbroken")

    def test_preflight_says_needed_and_free(self, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
        with pytest.raises(DiskError, match=r"needs about \d+ kB, 1\.00 kB are free"):
            quantize(tiny_llama, SCHEME, tmp_path / "out")
        monkeypatch.undo()
        quantize(tiny_llama, SCHEME, tmp_path / "out")


class TestOutputFolder:
    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_read_only(self, tmp_path: Path, tiny_llama: Path):
        tmp_path.chmod(0o555)
        try:
            with pytest.raises(ConfigError, match="cannot create the output folder"):
                quantize(tiny_llama, SCHEME, tmp_path / "out")
        finally:
            tmp_path.chmod(0o755)

    @pytest.mark.parametrize("name", ["out", "out.partial", "file/out"])
    def test_file_in_the_way(self, tmp_path: Path, tiny_llama: Path, name: str):
        (tmp_path / name.split("/")[0]).write_text("mine")
        with pytest.raises(ConfigError):
            quantize(tiny_llama, SCHEME, tmp_path / ("file/out" if "/" in name else "out"))
        assert [path.name for path in tmp_path.iterdir()] == [name.split("/")[0]]

    @pytest.mark.parametrize("inside", ["", "out", "deep/er"])
    def test_inside_the_source(
        self, tiny_llama: Path, copy_of: Callable[..., Path], inside: str, digests: Callable[[Path], dict[str, str]]
    ):
        source = copy_of(tiny_llama)
        before = digests(source)
        with pytest.raises(ConfigError, match="lies in the checkpoint's own folder"):
            quantize(source, SCHEME, source / inside)
        assert digests(source) == before

    def test_inside_the_source_through_a_link(self, tmp_path: Path, tiny_llama: Path, copy_of: Callable[..., Path]):
        source = copy_of(tiny_llama)
        (tmp_path / "link").symlink_to(source)
        with pytest.raises(ConfigError, match="own folder"):
            quantize(source, SCHEME, tmp_path / "link" / "out")

    def test_foreign_folder_is_left_alone(self, tmp_path: Path, tiny_llama: Path):
        out = tmp_path / "out"
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
        with pytest.raises(ConfigError, match="was not made by bitpress"):
            quantize(tiny_llama, SCHEME, out)
        assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.tex"]

    def test_empty_folder_is_used(self, tmp_path: Path, tiny_llama: Path):
        (tmp_path / "out").mkdir()
        quantize(tiny_llama, SCHEME, tmp_path / "out")
        assert (tmp_path / "out" / "bitpress.json").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_all_these_exit_with_two(self):
        assert ConfigError.exit_code == 2
        assert issubclass(ConfigError, BitpressError)
