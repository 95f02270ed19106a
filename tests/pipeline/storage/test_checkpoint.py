"""Untrusted checkpoints: whatever is wrong with one is said by name, before anything is written or run."""

import builtins
import json
import os
import pickle
import random
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress.pipeline.api import load, quantize
from bitpress.pipeline.errors import CheckpointError, ConfigError, DiskError
from bitpress.pipeline.storage import files as store
from bitpress.pipeline.storage.checkpoint import INDEX, SINGLE, Checkpoint

SCHEME = "int4-g32"
SOURCES = [Path(__file__).resolve().parents[3] / name for name in ("pipeline", "kernels", "eval")]


@pytest.fixture
def sharded(sharded_llama: Path, copy_of: Callable[..., Path]) -> Path:
    return copy_of(sharded_llama, "sharded")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A safetensors file of a few hundred bytes."""
    store.write_safetensors(tmp_path / "small.safetensors", {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3)})
    return tmp_path / "small.safetensors"


@pytest.fixture
def impatient() -> Iterator[None]:
    """Ends a test that blocks."""

    def stop(number: int, frame: Any) -> None:
        raise AssertionError("it blocks")

    was = signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, was)


def remap(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


class TestDamagedFiles:
    def test_cut_at_every_byte_of_the_header_and_at_random_points(self, small: Path):
        data = small.read_bytes()
        header = 8 + int.from_bytes(data[:8], "little")
        cuts = [*range(header + 1), *random.Random(0).sample(range(header, len(data)), 20)]
        for cut in cuts:
            small.write_bytes(data[:cut])
            with pytest.raises(CheckpointError, match=r"small\.safetensors"):
                Checkpoint.single(small)

    @pytest.mark.parametrize(
        "change",
        [lambda d: d + b"\0", lambda d: b"", lambda d: d[:-1], lambda d: d[: len(d) // 2], lambda d: b"\0" * len(d)],
        ids=["trailing byte", "empty", "one byte short", "half", "zeros"],
    )
    def test_named_and_before_any_output(
        self, source: Path, change: Callable[[bytes], bytes], refused_early: Callable[..., str]
    ):
        file = source / SINGLE
        file.write_bytes(change(file.read_bytes()))
        assert CheckpointError.exit_code == 3
        assert "truncated or corrupt" in refused_early(source, str(file))

    def test_damaged_shard_is_named(self, sharded: Path, refused_early: Callable[..., str]):
        file = sorted(sharded.glob("*.safetensors"))[1]
        file.write_bytes(file.read_bytes()[:-1])
        refused_early(sharded, file.name)

    def test_any_bytes_are_read_or_refused(self, small: Path):
        data = small.read_bytes()
        spots = st.lists(st.tuples(st.integers(0, len(data) - 1), st.binary(max_size=4)), min_size=1, max_size=4)

        @given(spots)
        @settings(max_examples=300, deadline=None, derandomize=True)
        def mutate(changes: list[tuple[int, bytes]]) -> None:
            mutated = bytearray(data)
            for spot, replacement in changes:
                mutated[spot : spot + 2] = replacement
            small.write_bytes(mutated)
            try:
                checkpoint = Checkpoint.single(small)
                for name in checkpoint.tensors:
                    checkpoint.read(name)
            except CheckpointError:
                pass

        mutate()

    def test_any_index_is_read_or_refused(self, tmp_path: Path):
        values = st.recursive(st.none() | st.integers() | st.text(max_size=6), lambda v: st.lists(v) | st.dictionaries(st.text(max_size=3), v), max_leaves=5)  # fmt: skip # noqa: E501

        @given(values | st.dictionaries(st.just("weight_map"), values))
        @settings(max_examples=200, deadline=None, derandomize=True)
        def read(value: Any) -> None:
            (tmp_path / INDEX).write_text(json.dumps(value))
            with pytest.raises(CheckpointError):
                Checkpoint(tmp_path)

        read()

    def test_flipped_bit_is_found_by_verification(self, source: Path, tmp_path: Path):
        quantize(source, SCHEME, tmp_path / "out")
        shard = tmp_path / "out" / "model-00003-of-00003.safetensors"
        data = bytearray(shard.read_bytes())
        data[-9] ^= 4
        shard.write_bytes(data)
        Checkpoint(tmp_path / "out")  # the format by itself cannot tell
        with pytest.raises(DiskError, match=r"model-00003-of-00003\.safetensors changed"):
            quantize(source, SCHEME, tmp_path / "out")

    def test_shorter_while_it_is_read(self, source: Path):
        checkpoint = Checkpoint(source)
        last = max(checkpoint.tensors.values(), key=lambda info: info.offset)
        os.truncate(source / SINGLE, last.offset + 1)
        with pytest.raises(CheckpointError, match="changed while it was read"):
            checkpoint.read(last.name)

    @pytest.mark.parametrize("name", ["config.json", SINGLE])
    def test_missing(self, source: Path, name: str, refused_early: Callable[..., str]):
        (source / name).unlink()
        refused_early(source, name)

    def test_no_folder(self, tmp_path: Path, refused_early: Callable[..., str]):
        refused_early(tmp_path / "nowhere", "is neither a folder nor a Hub id", ConfigError)


class TestIndex:
    def test_missing_shards_are_listed(self, sharded: Path, refused_early: Callable[..., str]):
        files = sorted(sharded.glob("*.safetensors"))
        for file in files[:2]:
            file.unlink()
        message = refused_early(sharded, "are missing")
        assert all(file.name in message for file in files[:2])

    def test_every_disagreement_at_once(self, sharded: Path, edit_tensors: Any, refused_early: Callable[..., str]):
        files = sorted(sharded.glob("*.safetensors"))
        held = {file.name: Checkpoint.names_in(file) for file in files}
        moved, unlisted, doubled = held[files[0].name][0], held[files[1].name][0], held[files[2].name][0]

        def change(weight_map: dict[str, str]) -> None:
            weight_map[moved] = files[1].name
            weight_map["ghost.weight"] = files[0].name
            del weight_map[unlisted]

        remap(sharded, change)
        edit_tensors(files[0], lambda tensors: tensors.update({doubled: torch.zeros(2)}))
        message = refused_early(sharded, "disagree")
        assert f"{moved} is in {files[0].name}, the index says {files[1].name}" in message
        assert f"{unlisted} is in {files[1].name}, the index says nothing" in message
        assert f"{doubled} is in both" in message
        assert f"ghost.weight is in the index, not in {files[0].name}" in message

    @pytest.mark.parametrize(
        "text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map"', "\xff"]
    )
    def test_unusable(self, sharded: Path, text: str, refused_early: Callable[..., str]):
        (sharded / INDEX).write_bytes(text.encode("latin-1"))
        refused_early(sharded, INDEX)

    def test_duplicate_key(self, sharded: Path, refused_early: Callable[..., str]):
        (sharded / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
        refused_early(sharded, "the key 'a' stands there twice")

    def test_index_and_single_file_that_it_does_not_name(
        self, sharded: Path, tiny_llama: Path, refused_early: Callable[..., str]
    ):
        (sharded / SINGLE).write_bytes((tiny_llama / SINGLE).read_bytes())
        refused_early(sharded, f"has both {SINGLE} and {INDEX}")

    @pytest.mark.parametrize(
        "value",
        [
            "../secret.safetensors", "../../secret.safetensors", "/etc/secret.safetensors", "sub/secret.safetensors",
            "C:secret.safetensors", "C:\\secret.safetensors", "\\\\host\\share\\secret.safetensors",
            "..\\secret.safetensors", "secret\0.safetensors", "file:secret.safetensors", "", ".", "..",
            "secret.bin", "secret.safetensors.bin", "secret.py", "x" * 300 + ".safetensors", "a\nb.safetensors",
            "\ud800.safetensors", None, 7, True, ["secret.safetensors"], {"file": "secret.safetensors"},
        ],
        ids=repr,
    )  # fmt: skip
    def test_attack_is_refused_before_anything_is_opened(
        self, sharded: Path, value: Any, monkeypatch: pytest.MonkeyPatch
    ):
        secret = sharded.parent / "secret.safetensors"
        store.write_safetensors(secret, {"a": torch.ones(1)})
        remap(sharded, lambda weight_map: weight_map.update({"lm_head.weight": value}))
        opened: list[Path] = []

        def watch(original: Callable[..., Any]) -> Callable[..., Any]:
            return lambda path, *a, **k: opened.append(Path(os.fsdecode(path))) or original(path, *a, **k)

        for module, name in ((builtins, "open"), (os, "open"), (Path, "open")):
            monkeypatch.setattr(module, name, watch(getattr(module, name)))
        monkeypatch.setattr("bitpress.pipeline.storage.checkpoint.safe_open", watch(None))  # calling it would raise
        with pytest.raises(CheckpointError, match="is not safe to follow") as caught:
            Checkpoint(sharded)
        assert "lm_head.weight: " in str(caught.value)
        assert {path.resolve() for path in opened} <= {sharded / INDEX}

    def test_every_attack_is_listed(self, sharded: Path, refused_early: Callable[..., str]):
        remap(sharded, lambda weight_map: weight_map.update({f"t{i}": f"../{i}.safetensors" for i in range(5)}))
        assert refused_early(sharded, "t0: ").count("is not a plain file name") == 5


class TestLinksAndPipes:
    def test_link_out_of_the_folder(self, source: Path, refused_early: Callable[..., str]):
        (source / SINGLE).rename(source.parent / "elsewhere.safetensors")
        (source / SINGLE).symlink_to(source.parent / "elsewhere.safetensors")
        refused_early(source, "is a link that leads out of its folder")

    @pytest.mark.parametrize("name", ["config.json", "LICENSE"])
    def test_link_out_of_the_folder_for_other_files(self, source: Path, name: str, refused_early: Callable[..., str]):
        (source / name).rename(source.parent / name)
        (source / name).symlink_to(source.parent / name)
        refused_early(source, "is a link that leads out of its folder")

    def test_link_within_the_folder(self, source: Path, tmp_path: Path):
        (source / SINGLE).rename(source / "real.safetensors")
        (source / SINGLE).symlink_to("real.safetensors")
        quantize(source, SCHEME, tmp_path / "out")

    def test_link_to_itself(self, sharded: Path, refused_early: Callable[..., str]):
        file = min(sharded.glob("*.safetensors"))
        file.unlink()
        file.symlink_to(file.name)
        refused_early(sharded, file.name)

    def test_layout_of_the_hub_cache(self, source: Path, tmp_path: Path):
        snapshot, blobs = tmp_path / "cache/snapshots/abc", tmp_path / "cache/blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        for number, path in enumerate(sorted(source.iterdir())):
            path.rename(blobs / str(number))
            (snapshot / path.name).symlink_to(f"../../blobs/{number}")
        quantize(snapshot, SCHEME, tmp_path / "out")
        assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())

    def test_hub_cache_link_past_the_blobs(self, source: Path, tmp_path: Path):
        snapshot = tmp_path / "cache/snapshots/abc"
        snapshot.parent.mkdir(parents=True)
        source.rename(snapshot)
        (snapshot / SINGLE).rename(tmp_path / "cache" / "other")
        (snapshot / SINGLE).symlink_to("../../other")
        with pytest.raises(CheckpointError, match="leads out"):
            Checkpoint(snapshot)

    @pytest.mark.usefixtures("impatient")
    @pytest.mark.parametrize("name", [SINGLE, INDEX, "config.json"])
    def test_pipe(self, source: Path, name: str, refused_early: Callable[..., str]):
        (source / name).unlink(missing_ok=True)
        os.mkfifo(source / name)
        refused_early(source, f"{name} is not a regular file")

    @pytest.mark.parametrize("name", [SINGLE, "config.json"])
    def test_folder(self, source: Path, name: str, refused_early: Callable[..., str]):
        (source / name).unlink()
        (source / name).mkdir()
        refused_early(source, f"{name} is not a regular file")

    @pytest.mark.usefixtures("impatient")
    @pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/outside")])
    def test_in_the_place_of_a_shard(self, sharded: Path, make: Callable[[Path], None]):
        shard = sorted(sharded.glob("*.safetensors"))[1]
        shard.unlink()
        make(shard)
        with pytest.raises(CheckpointError, match=shard.name):
            Checkpoint(sharded)

    def test_a_link_that_leads_out_is_never_opened(self, sharded: Path, tmp_path: Path, monkeypatch: Any):
        opened, original = [], Path.open
        monkeypatch.setattr(
            Path, "open", lambda path, *mode, **how: (opened.append(path), original(path, *mode, **how))[1]
        )
        shard = sorted(sharded.glob("*.safetensors"))[1]
        shard.rename(tmp_path / "other")
        shard.symlink_to(tmp_path / "other")
        with pytest.raises(CheckpointError, match="leads out"):
            Checkpoint(sharded)
        assert shard not in opened

    def test_pipe_among_the_other_files_stays_behind(self, source: Path, tmp_path: Path):
        os.mkfifo(source / "pipe.txt")
        quantize(source, SCHEME, tmp_path / "out")
        assert not (tmp_path / "out" / "pipe.txt").exists()


class Canary:
    """Its pickle makes a file when read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


class TestNothingIsExecuted:
    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "x.ckpt", "x.pkl"])
    def test_pickles_are_refused_unread(self, source: Path, name: str, refused_early: Callable[..., str]):
        canary = source.parent / "canary"
        (source / SINGLE).unlink()
        (source / name).write_bytes(pickle.dumps(Canary(canary)))
        assert "holds only pickles" in refused_early(source, name)
        with pytest.raises(CheckpointError, match="pickles"):
            load(source)
        assert not canary.exists()

    def test_pickles_beside_safetensors_are_neither_read_nor_copied(self, source: Path, tmp_path: Path):
        (source / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
        (source / "pytorch_model.bin.index.json").write_text("{}")
        quantize(source, SCHEME, tmp_path / "out")
        load(source)
        assert not (tmp_path / "canary").exists()
        assert not list((tmp_path / "out").glob("pytorch_model*"))

    def test_our_code_has_no_way_to_run_data(self):
        wrong = re.compile(
            r"torch\.load\b|\bpickle\.|import pickle|(?<![.\w])(eval|exec)\(|yaml\.load|trust_remote_code=(?!False)"
        )
        found = [
            f"{path.name}:{number}: {line.strip()}"
            for folder in SOURCES
            for path in folder.rglob("*.py")
            for number, line in enumerate(path.read_text().splitlines(), 1)
            if wrong.search(line)
        ]
        assert not found

    @pytest.mark.parametrize(
        "action", [lambda s: quantize(s, SCHEME, s.parent / "out"), load], ids=["quantize", "load"]
    )
    @pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
    def test_remote_code_is_refused_without_asking(
        self,
        source: Path,
        action: Callable[[Path], Any],
        file: str,
        monkeypatch: pytest.MonkeyPatch,
        edit_json: Callable[..., None],
    ):
        canary = source.parent / "canary"
        (source / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
        auto_map = {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
        auto_map["AutoTokenizer"] = ["modeling_evil.Evil", None]
        changes: dict[str, Any] = {"model_type": "evil"} if file == "config.json" else {"tokenizer_class": "Evil"}
        edit_json(source / file, auto_map=auto_map, **changes)
        with open(os.devnull) as closed:
            monkeypatch.setattr("sys.stdin", closed)
            closed.close()
            if (file, action) == ("config.json", load) or file == "config.json":
                with pytest.raises(CheckpointError, match=r"asks for code of its own \(auto_map\)"):
                    action(source)
            else:  # a tokenizer's code is no business of quantize's; whether load finds a tokenizer is transformers'
                try:
                    action(source)
                except CheckpointError as error:
                    assert "tokenizer" in str(error)  # noqa: PT017
        assert not canary.exists()
        assert not list(source.parent.rglob("out/*.py"))
