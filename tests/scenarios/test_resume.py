"""Whatever stops a run, the next one goes on, and its artifact has the bytes of an unbroken run."""

import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpress.pipeline.api import quantize
from bitpress.pipeline.cli import app
from bitpress.pipeline.errors import BitpressError, CheckpointError, ConfigError, DiskError
from bitpress.pipeline.quantize import artifact as stage
from bitpress.pipeline.quantize import recipe
from bitpress.pipeline.quantize.sequential import CalibratedBlocks
from bitpress.pipeline.storage import files, journal

SCHEME = "int4-g32"
DieAt = Callable[[int], None]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A forked child cannot use OpenMP's threads; what the parent makes must be comparable."""
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(was)


def in_child(job: Callable[[], Any]) -> int:
    """Exit code of a fork that runs `job`; negative where a signal ended it."""
    if (child := os.fork()) == 0:
        code = 99
        try:
            job()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def signal_at_commit(number: int, which: signal.Signals) -> None:
    """From here on, a signal to this process once `number` shards are committed."""
    append = journal.Journal.append

    def step(self: journal.Journal, entry: dict[str, Any]) -> None:
        append(self, entry)
        if len(self.entries) == number:
            os.kill(os.getpid(), which)

    journal.Journal.append = step  # type: ignore[method-assign]


def broken_after(source: Path, out: Path, commits: int, **options: Any) -> Path:
    """A run that dies once `commits` shards are committed; returns its work folder."""

    def job() -> None:
        signal_at_commit(commits, signal.SIGKILL)
        quantize(source, SCHEME, out, **options)

    assert in_child(job) == -signal.SIGKILL
    assert not out.exists()
    return out.with_name(f"{out.name}.partial")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


class TestKilled:
    @pytest.mark.parametrize(("scheme", "stride"), [(SCHEME, 1), ("nf4", 4)])
    def test_at_every_write_sync_and_rename(
        self,
        tiny_llama: Path,
        tmp_path: Path,
        scheme: str,
        stride: int,
        digests: Callable[[Path], dict[str, str]],
        die_at: DieAt,
    ):
        quantize(tiny_llama, scheme, tmp_path / "unbroken")
        expected = digests(tmp_path / "unbroken")

        def job() -> None:
            die_at(call)
            quantize(tiny_llama, scheme, out)

        for call in itertools.count(1, stride):
            out = tmp_path / f"out-{call}"
            code = in_child(job)
            quantize(tiny_llama, scheme, out)
            assert digests(out) == expected, f"killed at call {call}"
            assert not out.with_name(f"{out.name}.partial").exists()
            shutil.rmtree(out)
            if code == 0:
                break
            assert code == -signal.SIGKILL
        assert call > 30

    def test_killed_again_and_again(
        self, tiny_llama: Path, tmp_path: Path, out: Path, digests: Callable[[Path], dict[str, str]], die_at: DieAt
    ):
        """Each attempt dies a little later than the one before, on what that one left."""
        quantize(tiny_llama, SCHEME, tmp_path / "unbroken")

        def job() -> None:
            die_at(call)
            quantize(tiny_llama, SCHEME, out)

        for call in range(1, 100, 3):  # noqa: B007
            if in_child(job) == 0:
                break
        assert digests(out) == digests(tmp_path / "unbroken")

    def test_just_after_publishing(
        self, tiny_llama: Path, tmp_path: Path, out: Path, digests: Callable[[Path], dict[str, str]]
    ):
        quantize(tiny_llama, SCHEME, tmp_path / "unbroken")

        def job() -> None:
            files.remove_folder = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
            quantize(tiny_llama, SCHEME, out)

        assert in_child(job) == -signal.SIGKILL
        assert digests(out) == digests(tmp_path / "unbroken")
        assert quantize(tiny_llama, SCHEME, out).notes == ["finished before, verified"]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "unbroken"]

    def test_threads_do_not_change_the_bytes(self, tiny_llama: Path, tmp_path: Path, digests: Any):
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            quantize(tiny_llama, SCHEME, tmp_path / str(count))
        assert digests(tmp_path / "1") == digests(tmp_path / "2") == digests(tmp_path / "3")

    def test_what_was_committed_is_not_made_again(self, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
        broken_after(source, out, 2)
        made: list[str] = []
        original = stage.quantize_unit
        monkeypatch.setattr(stage, "quantize_unit", lambda *a: made.append(a[1].name) or original(*a))
        quantize(source, SCHEME, out)
        assert made == ["block 1"]


class TestKilledWhileCalibrating:
    """Each block is quantized from the outputs of the quantized ones before it, which lie on the disk."""

    @pytest.mark.parametrize(
        ("changes", "stride"),
        [
            ({}, 1),
            ({"transform": "awq"}, 23),
            ({"transform": "smooth", "scheme": "int8-dynamic", "keep_inputs": 0.5, "kv_cache": "int8"}, 13),
            ({"transform": "smooth", "scheme": "int8-static"}, 37),
            ({"scheme": "int2-g32", "distill": 3}, 29),
        ],
        ids=["gptq", "awq+gptq", "smooth+gptq, inputs kept, cache", "smooth+gptq, static", "gptq, distilled"],
    )
    def test_at_every_write_sync_and_rename(
        self,
        changes: dict[str, Any],
        stride: int,
        tiny_llama: Path,
        tmp_path: Path,
        digests: Callable[[Path], dict[str, str]],
        learn: Callable[..., list[str]],
        monkeypatch: pytest.MonkeyPatch,
        die_at: DieAt,
    ):
        kept = dict.fromkeys(["*.[kvo]_proj", "*.up_proj", "*.gate_proj"], "none")
        quick = {"layers": kept, "allow_split_fused": True, "options": {"rounds": 1, "passes": 0}, **changes}
        learn(tiny_llama, tmp_path / "unbroken", **quick)
        expected = digests(tmp_path / "unbroken") | digests(tmp_path / "unbroken.partial")
        assert "reference_logits.safetensors" in expected
        made: list[str] = []
        counts = set()
        original = CalibratedBlocks.quantize_block
        monkeypatch.setattr(CalibratedBlocks, "quantize_block", lambda *a: made.append(a[1].name) or original(*a))

        def job() -> None:
            die_at(call)
            learn(tiny_llama, out, **quick)

        for call in itertools.count(1, stride):
            out = tmp_path / f"out-{call}"
            code = in_child(job)
            made.clear()
            assert "made again" not in str(learn(tiny_llama, out, **quick))
            counts.add(len(made))
            work = out.with_name(f"{out.name}.partial")
            assert digests(out) | digests(work) == expected, f"killed at call {call}"
            assert not (work / "states").exists()
            assert not (work / stage.DISTILLED).exists()
            shutil.rmtree(out)
            shutil.rmtree(work)
            if code == 0:
                break
            assert code == -signal.SIGKILL
        assert call > 50
        assert counts == {0, 1, 2} or stride > 1, "at times none of the blocks was there, at times some or all"


class TestInterrupted:
    @pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
    def test_by_a_signal_exits_130_and_goes_on(
        self,
        source: Path,
        out: Path,
        tmp_path: Path,
        which: signal.Signals,
        capfd: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        digests: Callable[[Path], dict[str, str]],
    ):
        monkeypatch.setattr(sys, "argv", ["bitpress", "quantize", str(source), "--recipe", SCHEME, "-o", str(out)])

        def job() -> None:
            signal_at_commit(1, which)
            app.main()

        assert in_child(job) == 130
        shown = capfd.readouterr().err
        assert "run the same command again" in shown
        assert "Traceback" not in shown
        assert not out.exists()
        assert in_child(app.main) == 0
        quantize(source, SCHEME, tmp_path / "unbroken")
        assert digests(out) == digests(tmp_path / "unbroken")


class TestDamagedWork:
    @pytest.mark.parametrize("where", [0, 9, -1], ids=["length", "header", "last byte"])
    def test_flipped_byte_in_a_committed_shard_is_said_and_made_again(
        self, source: Path, out: Path, tmp_path: Path, where: int, digests: Callable[[Path], dict[str, str]]
    ):
        work = broken_after(source, out, 2)
        shard = work / "artifact.tmp" / "model-00002-of-00003.safetensors"
        data = bytearray(shard.read_bytes())
        data[where] ^= 1
        shard.write_bytes(data)
        assert quantize(source, SCHEME, out).notes == [f"{shard.name} is not as it was written; made again"]
        quantize(source, SCHEME, tmp_path / "unbroken")
        assert digests(out) == digests(tmp_path / "unbroken")

    def test_missing_shard_is_made_again(self, source: Path, out: Path):
        work = broken_after(source, out, 2)
        (work / "artifact.tmp" / "model-00001-of-00003.safetensors").unlink()
        assert "made again" in quantize(source, SCHEME, out).notes[0]

    @pytest.mark.parametrize("change", [lambda path: path.write_text(""), Path.unlink], ids=["emptied", "removed"])
    def test_lost_journal_is_refused(
        self, source: Path, out: Path, change: Callable[[Path], Any], digests: Callable[[Path], dict[str, str]]
    ):
        work = broken_after(source, out, 2)
        change(work / "journal.jsonl")
        before = digests(work / "artifact.tmp")
        with pytest.raises(ConfigError, match=r"lacks lines for 2 finished files.*move .* away"):
            quantize(source, SCHEME, out)
        assert digests(work / "artifact.tmp") == before

    def test_damaged_journal_is_refused(self, source: Path, out: Path):
        work = broken_after(source, out, 2)
        path = work / "journal.jsonl"
        path.write_bytes(path.read_bytes().replace(b"relative_error", b"relative_errox", 1))
        with pytest.raises(ConfigError, match=r"journal.jsonl: line \d is not as it was written"):
            quantize(source, SCHEME, out)

    def test_journal_of_another_checkpoint_is_refused(self, source: Path, out: Path):
        work = broken_after(source, out, 1)
        journal.Journal(work / "journal.jsonl").append({"file": "model-00009-of-00009.safetensors", "unit": "block 8"})
        with pytest.raises(ConfigError, match="is not of this checkpoint"):
            quantize(source, SCHEME, out)

    def test_lost_fingerprint_is_refused(self, source: Path, out: Path):
        work = broken_after(source, out, 1)
        (work / "run.json").unlink()
        with pytest.raises(ConfigError, match=r"run\.json is missing"):
            quantize(source, SCHEME, out)

    @pytest.mark.parametrize(
        ("changes", "kind", "said"),
        [
            ({"fingerprint": 5}, ConfigError, "the fingerprint is 5, expected an object"),
            ({"coverage": []}, DiskError, r"bitpress\.json is damaged"),
            ({"coverage": {"layers": [7]}}, DiskError, r"bitpress\.json is damaged"),
            ({"files": {"config.json": 7}}, DiskError, r"bitpress\.json is damaged"),
        ],
        ids=str,
    )
    def test_a_damaged_manifest_is_one_sentence(
        self, source: Path, out: Path, edit_json: Callable[..., None], changes: Any, kind: Any, said: str
    ):
        quantize(source, SCHEME, out)
        edit_json(out / "bitpress.json", **changes)
        with pytest.raises(kind, match=said):
            quantize(source, SCHEME, out)

    def test_flipped_byte_in_a_finished_artifact_is_named(self, source: Path, out: Path):
        quantize(source, SCHEME, out)
        shard = out / "model-00002-of-00003.safetensors"
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
        with pytest.raises(DiskError, match=r"model-00002-of-00003\.safetensors changed since"):
            quantize(source, SCHEME, out)


def flip(path: Path, where: int) -> None:
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)


def retrain(source: Path) -> None:
    flip(source / "model.safetensors", -2)


def touch_config(source: Path) -> None:
    path = source / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))


CHANGES: dict[str, tuple[Callable[[Path], None], dict[str, Any], str]] = {
    "scheme": (lambda source: None, {"scheme": "int4-g64"}, "quantize.scheme: was 'int4-g32', is 'int4-g64'"),
    "format": (lambda source: None, {"format": "compressed-tensors"}, "quantize.format"),
    "layers": (lambda source: None, {"layers": {"*.down_proj": "none"}}, "quantize.layers: was {}, is"),
    "weights": (retrain, {}, "files.model.safetensors"),
    "config": (touch_config, {}, "files.config.json"),
    "licence": (lambda source: (source / "LICENSE").write_text("new"), {}, "files.LICENSE: was '"),
    "new file": (lambda source: (source / "NOTICE").write_text("new"), {}, "files.NOTICE: was None"),
}  # fmt: skip


class TestChanged:
    @pytest.mark.parametrize("finished", [False, True], ids=["unfinished", "finished"])
    @pytest.mark.parametrize("what", CHANGES)
    def test_since_the_run_began_is_refused_by_name(self, source: Path, out: Path, what: str, finished: bool):
        change, options, message = CHANGES[what]
        if finished:
            quantize(source, SCHEME, out)
        else:
            broken_after(source, out, 2)
        change(source)
        with pytest.raises(ConfigError) as caught:
            quantize(source, {"scheme": SCHEME, **options}, out)
        assert message in str(caught.value)
        assert "choose another output, move it away, or run its config again with --redo quantize" in str(caught.value)

    @pytest.mark.parametrize("package", ["torch", "bitpress", "transformers"])
    def test_versions(self, source: Path, out: Path, package: str, monkeypatch: pytest.MonkeyPatch):
        broken_after(source, out, 1)
        now = recipe.releases()
        monkeypatch.setattr(recipe, "releases", lambda: {**now, package: "99.0"})
        with pytest.raises(ConfigError, match=rf"versions\.{package}: was .*, is '99\.0'"):
            quantize(source, SCHEME, out)

    def test_method_version(self, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
        broken_after(source, out, 1)
        monkeypatch.setattr("bitpress.pipeline.methods.absmax.Absmax.version", 99)
        with pytest.raises(ConfigError, match=r"quantize\.absmax\.version: was .*, is 99"):
            quantize(source, SCHEME, out)

    def test_one_weight_deep_inside(self, source: Path, out: Path):
        """A change that no header and no sample shows: the source of committed shards is hashed again."""
        broken_after(source, out, 2)
        header = int.from_bytes((source / "model.safetensors").read_bytes()[:8], "little")
        flip(source / "model.safetensors", 8 + header + 5000)
        with pytest.raises(ConfigError, match=r"the weights of .* \(outside 0\) changed since this run began"):
            quantize(source, SCHEME, out)

    @pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
    def test_while_it_runs(self, source: Path, out: Path, file: str):
        def touch(done: int, total: int) -> None:
            if done == 1:
                os.utime(source / file, ns=(1, 1))

        with pytest.raises(CheckpointError, match=f"{file} changed while it was being read"):
            quantize(source, SCHEME, out, on_step=touch)
        assert not out.exists()

    def test_source_removed_while_it_runs(self, source: Path, out: Path):
        def remove(done: int, total: int) -> None:
            if done == 1:
                shutil.rmtree(source)

        with pytest.raises(BitpressError):
            quantize(source, SCHEME, out, on_step=remove)
        assert not out.exists()
