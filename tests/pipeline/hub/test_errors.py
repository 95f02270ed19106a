"""Each failure of the Hub: its sentence, its exit code, no token anywhere, and a rerun that finishes."""

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from standin import CANARY, File, Hub, answer
from werkzeug.wrappers import Response

from bitpress.pipeline.cli import app
from bitpress.pipeline.errors import HubError
from bitpress.pipeline.hub.errors import upload_error
from bitpress.pipeline.publish import upload as publish

REPO = "user/tiny-int4"
ECHO = f"no, not with Bearer {CANARY}"  # a server may repeat what it was given
ALWAYS = 99
LOST = f"the connection to the Hub failed for {REPO} ("
Command = Callable[[], tuple[int, str]]
# what stands in the way, and what is said of it
FAILURES: dict[str, tuple[str, dict[str, Any], str]] = {
    "token": ("whoami", {"status": 401, "said": ECHO}, "the Hub does not accept the token; `hf auth login` again"),
    "read-only token": (
        "repos/create",
        {"status": 403, "said": ECHO},
        f"user's token may not write to {REPO} (no, not with Bearer <TOKEN>); use one with write access to it",
    ),
    "gated": (
        "GET /api/models",
        {"status": 403, "code": "GatedRepo"},
        f"{REPO} is gated, and user's token has no access",
    ),
    "gone": ("/preupload/", {"status": 404, "code": "RepoNotFound"}, f"{REPO} is not on the Hub, or hidden from user"),
    "conflict": ("/commit/", {"status": 409}, f"something else is being done to {REPO} on the Hub"),
    "moved": ("/commit/", {"status": 412}, f"{REPO} was changed by somebody else meanwhile, and nothing of it was"),
    "too many": (
        "/commit/",
        {"status": 429, "headers": {"Retry-After": "3600"}},
        "the Hub takes no more requests from this account for now (told to fail); wait 3600 seconds, then run again",
    ),
    "too many, for ever": ("/commit/", {"status": 429, "times": ALWAYS}, "wait some minutes, then run again"),
    "unwell at first": (
        "whoami",
        {"status": 503, "times": ALWAYS, "said": ECHO},
        f"the Hub answered 503 for {REPO} (no",
    ),
    "unwell in mid-upload": ("PUT /lfs", {"times": ALWAYS, "said": ECHO}, f"the Hub answered 500 for {REPO}"),
    "unwell at last": ("/commit/", {"status": 502, "times": ALWAYS}, f"the Hub answered 502 for {REPO}"),
    "full": ("/commit/", {"status": 402, "said": "quota exceeded"}, f"answered 402 for {REPO} (quota exceeded); run"),
    "silent": (
        "GET /api/models",
        {"times": ALWAYS, "how": "stall"},
        f"{LOST}ReadTimeout); check the network and run",
    ),
    "silent in mid-upload": ("PUT /lfs", {"times": ALWAYS, "how": "stall"}, f"{LOST}ReadTimeout)"),
    "cut in mid-upload": ("PUT /lfs", {"times": ALWAYS, "how": "cut"}, LOST),
    "cut at the commit": ("/commit/", {"times": ALWAYS, "how": "cut"}, LOST),
}


@pytest.fixture
def failing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Callable[..., contextlib.AbstractContextManager[None]]:
    """with failing("PUT /lfs", status=500): the Hub fails as told; where it stalls, nobody waits long for it."""

    @contextlib.contextmanager
    def fail(part: str, **how: Any) -> Iterator[None]:
        hub.fail(part, **{"said": "told to fail", **how})
        with monkeypatch.context() as patch:
            if how.get("how") == "stall":
                patch.setattr(publish, "PATIENCE", 0.6)
            yield
        hub.failures.clear()

    return fail


@pytest.fixture
def bitpress(
    hub: Hub, runs: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[], tuple[int, str]]:
    """bitpress(): exit code and stderr of publishing; the token is in no output, and in no file that was written."""

    def call() -> tuple[int, str]:
        command = ["bitpress", "--debug", "publish", str(runs / "int4-g32"), "--repo", REPO]
        monkeypatch.setattr(sys, "argv", command)
        for handler in logging.getLogger("huggingface_hub").handlers:
            monkeypatch.setattr(handler, "stream", sys.stderr)
        with pytest.raises(SystemExit) as stop:
            app.main()
        said = capfd.readouterr()
        assert CANARY not in said.out + said.err
        for path in runs.parent.rglob("*"):
            assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path
        return int(stop.value.code or 0), " ".join(said.err.split())

    return call


def finishes(bitpress: Command, hub: Hub, runs: Path) -> None:
    """What was uploaded is not sent again, and in the end all is there."""
    hub.requests.clear()
    kept = [f"PUT /lfs/{sha256}" for sha256 in hub.blobs]
    assert bitpress()[0] == 0
    assert not set(kept) & set(hub.requests)
    receipt = json.loads((runs / "int4-g32" / "publish.json").read_text())
    oid, files = hub.repos[REPO].commits[-1]
    assert receipt["revision"] == oid
    assert {name: files[name].sha256 for name in receipt["files"]} == {
        name: entry["sha256"] for name, entry in receipt["files"].items()
    }


@pytest.mark.parametrize("name", FAILURES)
def test_each(name: str, bitpress: Command, failing: Any, hub: Hub, runs: Path) -> None:
    part, how, said = FAILURES[name]
    with failing(part, **how):
        code, told = bitpress()
    assert (code, said in told) == (6, True), told
    assert "Traceback" in told  # of --debug, in which the token is not either
    assert REPO not in hub.repos or len(hub.repos[REPO].commits) == 1
    receipt = runs / "int4-g32" / "publish.json"
    assert not receipt.exists() or json.loads(receipt.read_text())["revision"] is None
    finishes(bitpress, hub, runs)


@pytest.mark.parametrize(
    ("part", "how", "seconds"),
    [
        ("whoami", {"status": 500}, 1),
        ("whoami", {"status": 503, "times": 2}, 2),
        ("GET /api/models", {"how": "stall"}, 1),
        ("/commit/", {"status": 429, "headers": {"Retry-After": "7"}}, 7),
        ("PUT /lfs", {"status": 429, "headers": {"Retry-After": "7"}}, 8),  # the client adds a second
        ("PUT /lfs", {"how": "cut"}, 1),
        ("/batch", {"status": 504}, 1),
    ],
)
def test_what_passes(
    part: str, how: dict[str, Any], seconds: float, bitpress: Command, failing: Any, hub: Hub, waits: list[float]
) -> None:
    """It is waited for, as long as the Hub asks."""
    with failing(part, **how):
        assert bitpress()[0] == 0
    assert seconds in waits
    assert len(hub.repos[REPO].commits) == 2


def test_an_answer_that_is_lost(bitpress: Command, hub: Hub, runs: Path) -> None:
    """The commit was made, and is not made twice."""
    hub.fail("/commit/", how="lose")
    assert bitpress()[0] == 0
    assert len(hub.repos[REPO].commits) == 2
    assert json.loads((runs / "int4-g32" / "publish.json").read_text())["revision"] == hub.repos[REPO].commits[-1][0]


def test_somebody_else_commits_meanwhile(
    bitpress: Command, hub: Hub, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = Hub.do_batch

    def meanwhile(self: Hub, *arguments: Any, **names: str) -> Response:
        self.put(REPO, "by-hand.txt", b"meanwhile")
        return upload(self, *arguments, **names)

    with monkeypatch.context() as patch:
        patch.setattr(Hub, "do_batch", meanwhile)
        code, said = bitpress()
    assert code == 6
    assert f"{REPO} was changed by somebody else meanwhile" in said
    assert "README.md" not in hub.repos[REPO].commits[-1][1]
    finishes(bitpress, hub, runs)
    assert hub.content(REPO, "by-hand.txt") == b"meanwhile"


def test_other_bytes_than_were_sent(bitpress: Command, hub: Hub, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = Hub._changed

    def spoil(self: Hub, key: str, value: dict[str, Any]) -> tuple[str, File]:
        path, file = keep(self, key, value)
        return path, File.of(b"spoilt", lfs=False) if path == "LICENSE" else file

    with monkeypatch.context() as patch:
        patch.setattr(Hub, "_changed", spoil)
        code, said = bitpress()
    assert code == 6
    assert f"{REPO} does not hold what was sent: LICENSE; run again to mend that" in said
    finishes(bitpress, hub, runs)


@pytest.mark.parametrize("page", [Response("<html>"), answer([]), answer({}), answer({"name": None})], ids=range(4))
def test_something_else_answers(
    page: Response, bitpress: Command, hub: Hub, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log-in page of a hotel's network, say."""
    with monkeypatch.context() as patch:
        patch.setattr(Hub, "_answer", lambda self, request, body: page)
        code, said = bitpress()
    assert code == 6
    assert f"publishing {REPO} failed: " in said
    finishes(bitpress, hub, runs)


def test_nobody_there(bitpress: Command, hub: Hub, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        code, said = bitpress()
    assert (code, f"{LOST}ConnectError); check the network" in said) == (6, True)
    finishes(bitpress, hub, runs)


def test_offline(bitpress: Command, hub: Hub, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        code, said = bitpress()
    assert (code, f"{REPO}: HF_HUB_OFFLINE forbids asking the Hub; unset it" in said) == (6, True)
    finishes(bitpress, hub, runs)


def test_a_collection_that_cannot_be_made(hub: Hub, runs: Path) -> None:
    """The run is published all the same, which a rerun knows."""
    upload = publish.prepare(runs / "int4-g32", REPO, override=False)
    for part in ("POST /api/collections", "/items"):
        hub.fail(part, status=403)
        with pytest.raises(HubError, match="may not write"):
            publish.send(upload, collection="Tiny things")
        receipt = json.loads((runs / "int4-g32" / "publish.json").read_text())
        assert (receipt["revision"], receipt["collection"]) == (hub.repos[REPO].commits[-1][0], None)
    assert publish.send(upload, collection="Tiny things").state == "already there"
    [collection] = hub.collections.values()
    assert [item["id"] for item in collection["items"]] == [REPO]


def test_metadata_that_the_hub_refuses_is_no_case_for_another_try() -> None:
    refusal = '"license" must be one of [mit, other]'
    said = str(upload_error(ValueError(f"Invalid metadata in README.md.\n- {refusal}\n- \x1b[2Jmore"), "me/r", "me"))
    assert f"the Hub does not take the card's metadata ({refusal}; " in said
    assert "mend these in the README.md" in said
    assert "\x1b" not in said
    assert "run again:" not in said
