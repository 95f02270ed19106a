"""Where models come from: folders, and the Hub through its real client against a stand-in on this machine."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, file_download

from bitpress.pipeline.errors import CheckpointError, ConfigError, DiskError, HubError
from bitpress.pipeline.hub import download
from bitpress.pipeline.hub.download import Source, resolve

MODEL = "org/tiny"
COMMIT, OLDER = "c0ffee" + "0" * 34, "0" * 34 + "facade"
DECOYS = {"pytorch_model.bin": b"pickle", "consolidated.safetensors": b"copy", "original/model.00.pth": b"pickle"}
OFFLINE = f"{MODEL} is not wholly in the local cache, and HF_HUB_OFFLINE forbids asking the Hub; unset it"
NOWHERE = ("gone", "/gone/away", "./gone", "../gone", "~/gone", "~nobody-here/x", "a/b/c", "", "org/na me", "a" * 5000)
TWICE = """
import sys
from pathlib import Path
from bitpress.pipeline.cli.app import main
lines = []
for model in sys.argv[1:]:
    sys.argv = ["bitpress", "quantize", model, "--recipe", "int4-g32", "-o", "out"]
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    lines.append(f"{model} {code} {Path('out').exists()}")
print(*lines, sep="\\n")
"""  # a process takes seconds to begin


@dataclass
class Answer:
    """What stands in the way of a request: a status, the Hub's code for it, or a body cut short."""

    status: int
    code: str | None = None
    cut: bool = False


@dataclass
class Hub:
    """A repository and its revisions, served as huggingface.co does; `refuse` maps a part of a path to an Answer."""

    files: dict[str, bytes]
    revisions: dict[str, str]
    refuse: dict[str, Answer] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""

    def fetched(self) -> set[str]:
        return {path.split("/resolve/")[1].split("/", 1)[1] for kind, path in self.requests if kind == "GET" and "/resolve/" in path}  # fmt: skip # noqa: E501

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(handler.path).path)
        self.requests.append((handler.command, path))
        blocked = next((answer for part, answer in self.refuse.items() if part in path), None)
        if blocked and not blocked.cut:
            return self.send(handler, blocked.status, b"{}", {"X-Error-Code": blocked.code} if blocked.code else {})
        kind, _, rest = path.removeprefix("/api/models").removeprefix(f"/{MODEL}").lstrip("/").partition("/")
        if path == f"/api/models/{MODEL}":
            kind, rest = "revision", "main"
        revision, _, name = rest.partition("/")
        commit = self.revisions.get(revision)
        if MODEL not in path:
            return self.send(handler, 401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if commit is None:
            return self.send(handler, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if kind == "revision":
            return self.send(handler, 200, json.dumps({"id": MODEL, "sha": commit}).encode())
        if kind == "tree":
            listing = [{"type": "file", "path": p, "size": len(b), "oid": self.etag(b)} for p, b in self.files.items()]
            return self.send(handler, 200, json.dumps(listing).encode())
        if name not in self.files:
            return self.send(handler, 404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{self.etag(self.files[name])}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        return self.send(handler, 200, self.files[name], headers, cut=bool(blocked))

    @staticmethod
    def etag(content: bytes) -> str:
        return hashlib.sha1(content).hexdigest()

    @staticmethod
    def send(handler, status: int, body: bytes, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        handler.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            handler.send_header(key, value)
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(body[: len(body) // 2] if cut else body)


@pytest.fixture
def hub(sharded_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, serving a sharded tiny Llama; the client in this process is turned to it, with an empty cache."""
    files = {path.name: path.read_bytes() for path in sharded_llama.iterdir()}
    stand_in = Hub({**files, **DECOYS, "original/params.json": b"{}"}, {"main": COMMIT, COMMIT: COMMIT, OLDER: OLDER})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            stand_in.answer(self)

        do_HEAD = do_GET

        def log_message(self, *arguments):
            """Silence: the base class writes each request to stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    stand_in.url = f"http://127.0.0.1:{server.server_port}"
    turn_to(stand_in.url, tmp_path / "cache", monkeypatch)
    yield stand_in
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()


def turn_to(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub reads its environment once, when it is imported."""
    huggingface_hub.close_session()
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits between its attempts."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def refusal(model: str = MODEL, revision: str | None = None) -> str:
    with pytest.raises(HubError) as caught:
        resolve(model, revision)
    assert caught.value.exit_code == 6
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestLocal:
    def test_the_demo_model(self):
        found = resolve("builtin:demo")
        assert (found.id, found.revision) == ("builtin:demo", None)
        assert found.folder == Path(download.__file__).parents[1] / "demo_model"

    def test_a_folder(self, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
        assert resolve(str(tiny_llama)) == Source("tiny-llama", None, tiny_llama)
        monkeypatch.chdir(tiny_llama)
        assert resolve(".").id == "tiny-llama"
        assert resolve(".").to_dict() == {"id": "tiny-llama", "revision": None}

    def test_a_folder_wins_over_a_hub_id(self, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        (tmp_path / MODEL).mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert resolve(MODEL).revision is None
        assert not hub.requests

    def test_a_folder_has_no_revision(self, tiny_llama: Path):
        with pytest.raises(ConfigError, match="is a local folder, which has no revision main; leave revision out"):
            resolve(str(tiny_llama), "main")

    @pytest.mark.parametrize("name", NOWHERE, ids=range(len(NOWHERE)))
    def test_neither_folder_nor_id(self, name: str, hub: Hub):
        with pytest.raises(ConfigError, match=r"is (neither a folder nor|not) a Hub id") as caught:
            resolve(name)
        assert caught.value.exit_code == 2
        assert not hub.requests


class TestDownload:
    def test_a_branch_becomes_its_commit(self, hub: Hub):
        for revision in (None, "main", COMMIT):
            found = resolve(MODEL, revision)
            assert found.to_dict() == {"id": MODEL, "revision": COMMIT}
            assert found.folder.name == COMMIT
        assert resolve(MODEL, OLDER).revision == OLDER

    def test_only_what_the_index_names(self, hub: Hub):
        folder = resolve(MODEL).folder
        shards = {name for name in hub.files if name.startswith("model-0")}
        assert len(shards) > 1
        assert hub.fetched() >= shards | {"config.json", "tokenizer.json", "model.safetensors.index.json"}
        assert not hub.fetched() & set(DECOYS)
        for name in hub.fetched():
            assert (folder / name).read_bytes() == hub.files[name]

    def test_one_file(self, hub: Hub, tiny_llama: Path):
        hub.files = {path.name: path.read_bytes() for path in tiny_llama.iterdir()} | DECOYS
        folder = resolve(MODEL).folder
        assert hub.fetched() == set(hub.files) - set(DECOYS)
        assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]

    def test_it_loads_as_the_folder_does(self, hub: Hub, sharded_llama: Path):
        from bitpress.pipeline.api import load

        ids = torch.arange(16).unsqueeze(0)
        (model, tokenizer), (expected, same) = load(MODEL), load(sharded_llama)
        assert torch.equal(model(ids).logits, expected(ids).logits)
        assert tokenizer("abc")["input_ids"] == same("abc")["input_ids"]

    def test_nothing_is_fetched_twice(self, hub: Hub):
        resolve(MODEL)
        hub.requests.clear()
        resolve(MODEL)
        assert not hub.fetched()

    def test_without_safetensors(self, hub: Hub):
        hub.files = {"config.json": b"{}", **DECOYS}
        with pytest.raises(CheckpointError, match=f"{MODEL} has no model.safetensors on the Hub.*pickles") as caught:
            resolve(MODEL)
        assert caught.value.exit_code == 3
        assert not hub.fetched() & set(DECOYS)

    @pytest.mark.parametrize(
        "weight_map", [None, [], "x", {"a": 3}, {"a": "*"}, {"a": "../../secret"}, {"a": "[a-z]*"}]
    )
    def test_an_index_that_is_not_one_fetches_nothing_else(self, hub: Hub, weight_map: object):
        """What is wrong with it is for Checkpoint to say."""
        from bitpress.pipeline.storage.checkpoint import Checkpoint

        hub.files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
        folder = resolve(MODEL).folder
        assert not hub.fetched() & set(DECOYS)
        assert not any(name.endswith(".safetensors") for name in hub.fetched())
        with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
            Checkpoint(folder)

    def test_an_index_that_is_not_json(self, hub: Hub):
        hub.files["model.safetensors.index.json"] = b"{"
        with pytest.raises(CheckpointError, match=r"index\.json: not a readable JSON file"):
            resolve(MODEL)


class TestRefusals:
    def test_not_there_or_private(self, hub: Hub):
        assert refusal("org/gone") == (
            "org/gone is no folder here, and not on the Hub or private: check the spelling, or `hf auth login`"
        )

    @pytest.mark.parametrize("part", ["/api/models/", "/config.json"])
    def test_gated(self, hub: Hub, part: str):
        """The Hub lists the files of a gated model to everybody, and refuses their content."""
        hub.refuse[part] = Answer(401, "GatedRepo")
        assert refusal().startswith(f"{MODEL} is gated: accept its terms on its page, then `hf auth login`")

    def test_a_token_that_is_not_accepted(self, hub: Hub):
        hub.refuse["/api/models/"] = Answer(403)
        assert refusal() == f"the Hub answered 403 for {MODEL}; your token is not accepted: `hf auth login` again"

    def test_no_such_revision(self, hub: Hub):
        assert refusal(revision="v9") == (
            f"{MODEL} has no revision v9; look up its branches, tags and commits on its page"
        )
        assert "has no revision " + "9" * 40 in refusal(revision="9" * 40)

    @pytest.mark.parametrize("part", ["/api/models/", "/tree/", "/config.json", "/model-00001"])
    @pytest.mark.parametrize("status", [429, 500, 503])
    def test_the_hub_is_unwell(self, hub: Hub, no_waiting: None, part: str, status: int):
        hub.refuse[part] = Answer(status)
        assert refusal() == f"the Hub answered {status} for {MODEL}; try again later"

    def test_a_file_gone_between(self, hub: Hub):
        hub.refuse["/resolve/"] = Answer(404, "EntryNotFound")
        assert refusal() == f"the Hub answered 404 for {MODEL}; try again later"

    def test_unreachable(self, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        turn_to("http://127.0.0.1:9", tmp_path / "cache", monkeypatch)
        assert (
            refusal() == f"the connection to the Hub failed for {MODEL} (ConnectError); check the network and run again"
        )

    def test_a_download_that_breaks_off_again_and_again(self, hub: Hub, no_waiting: None):
        hub.refuse["/model-00001"] = Answer(200, cut=True)
        assert refusal().startswith(f"the connection to the Hub failed for {MODEL} (RemoteProtocolError)")
        hub.refuse.clear()
        assert resolve(MODEL).revision == COMMIT

    @pytest.mark.parametrize("page", [b"<html>", b"{}", b"[]"])
    def test_something_else_answers(self, page: bytes, hub: Hub, monkeypatch: pytest.MonkeyPatch):
        """The log-in page of a hotel's network, say."""
        monkeypatch.setattr(Hub, "answer", lambda self, handler: self.send(handler, 200, page))
        assert refusal().startswith(f"the download of {MODEL} failed: ")

    def test_a_cache_that_cannot_be_written(self, hub: Hub, monkeypatch: pytest.MonkeyPatch):
        def full(*arguments, **settings):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "blob")

        monkeypatch.setattr(download.huggingface_hub, "snapshot_download", full)
        with pytest.raises(DiskError, match="blob: cannot be written to the Hub's cache: No space left") as caught:
            resolve(MODEL)
        assert caught.value.exit_code == 5


class TestOffline:
    def test_not_in_the_cache(self, hub: Hub, offline: None):
        assert refusal() == OFFLINE
        assert not hub.requests

    def test_in_the_cache(self, hub: Hub, monkeypatch: pytest.MonkeyPatch):
        online = resolve(MODEL)
        hub.requests.clear()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        for revision in (None, "main", COMMIT):
            assert resolve(MODEL, revision) == online
        assert not hub.requests

    def test_in_the_cache_while_the_hub_is_away(self, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        online = resolve(MODEL)
        hub.refuse["/api/models/"] = Answer(500)
        assert resolve(MODEL) == online
        turn_to("http://127.0.0.1:9", tmp_path / "cache", monkeypatch)
        assert resolve(MODEL) == online

    def test_in_the_cache_only_in_part(self, hub: Hub, no_waiting: None, monkeypatch: pytest.MonkeyPatch):
        hub.refuse["/model-00002"] = Answer(500)
        refusal()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert refusal() == OFFLINE


def test_the_command_in_its_own_process(hub: Hub, tmp_path: Path):
    """By the environment alone, as a user has it: a refusal exits with 6; a model is quantized, its commit recorded."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*"}
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    command = [sys.executable, "-c", TWICE, "org/gone", MODEL]
    done = subprocess.run(
        command, cwd=tmp_path, env=clean | settings, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["org/gone 6 False", f"{MODEL} 0 True"]
    assert "org/gone is no folder here" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert COMMIT in (tmp_path / "out" / "bitpress.json").read_text()
