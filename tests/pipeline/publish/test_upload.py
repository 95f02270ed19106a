"""Publishing: what goes up and what stays here, who may stop it, and that a rerun finds its own work."""

import hashlib
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from standin import CANARY, Hub

from bitpress.pipeline.api import publish
from bitpress.pipeline.checkpoints.doctor import diagnose
from bitpress.pipeline.cli import app
from bitpress.pipeline.config.schema import Gates, Publish, Run
from bitpress.pipeline.errors import CheckpointError, ConfigError, GateError, HubError
from bitpress.pipeline.evaluate.metrics import sealed
from bitpress.pipeline.publish import bundle
from bitpress.pipeline.runs.run import execute

REPO = "user/tiny-int4"
UP = {
    "LICENSE", "README.md", "bitpress.json", "chat_template.jinja", "config.json", "generation_config.json",
    "metrics.json", "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
    "model-00003-of-00003.safetensors", "model.safetensors.index.json", "quantize_config.json", "report.html",
    "report.md", "tokenizer.json", "tokenizer_config.json", *(f"figures/{number}.png" for number in (1, 2, 3)),
}  # fmt: skip
MADE = {"README.md", "bitpress.json", "metrics.json", "report.md", "report.html"}  # for the Hub, of what is here


@pytest.fixture
def run(runs: Path) -> Path:
    return runs / "int4-g32"


def receipt(run: Path) -> dict[str, Any]:
    return json.loads((run / "publish.json").read_text())


def edit(path: Path, **changes: Any) -> None:
    edited = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(sealed(edited) if path.name == "metrics.json" else edited))


def written(hub: Hub) -> list[str]:
    return [asked for asked in hub.requests if "/commit/" in asked or asked.startswith("PUT")]


def test_what_goes_up(hub: Hub, run: Path, tmp_path: Path) -> None:
    found = publish(run, REPO)
    assert (found.state, found.url) == ("published", f"{hub.url}/{REPO}")
    [(_, empty), (revision, files)] = hub.repos[REPO].commits
    assert files.keys() - empty.keys() == UP == set(found.files)
    for name in {name for name in UP - MADE if not name.startswith("figures/")}:
        assert hub.content(REPO, name) == (run / "artifact" / name).read_bytes()
    assert hub.content(REPO, "README.md") == (run / "card.md").read_bytes()
    assert found.revision == receipt(run)["revision"] == revision
    entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in receipt(run)["files"].items()}
    assert entries == {name: (file.size, file.sha256) for name, file in files.items() if name in UP}
    assert receipt(run)["card_sha256"] == hashlib.sha256(hub.content(REPO, "README.md")).hexdigest()
    assert receipt(run)["time"] == "2026-01-01T00:00:01+00:00"
    downloaded = tmp_path / "downloaded"
    (downloaded / "figures").mkdir(parents=True)
    for name in UP:
        (downloaded / name).write_bytes(hub.content(REPO, name))
    assert diagnose(downloaded).faults == []


def test_the_card_shows_figures(hub: Hub, run: Path) -> None:
    publish(run, REPO)
    shown = re.findall(r"!\[.+?\]\((.+?)\)", hub.content(REPO, "README.md").decode())
    assert shown == sorted(name for name in UP if name.startswith("figures/"))
    for name in shown:
        pixels = imread(io.BytesIO(hub.content(REPO, name)), format="png")
        assert pixels.shape[1] > 600
        assert pixels[..., :3].std() > 0.02  # something is drawn


def test_paths_of_this_machine_stay_here(
    hub: Hub, run: Path, published_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(run.parent.parent))
    edit(run / "metrics.json", command=f"bitpress run {run.parent.parent}/secret/tiny.yaml")
    publish(run, REPO)
    for name in ("README.md", "metrics.json", "report.md", "report.html"):
        content = hub.content(REPO, name).decode()
        assert str(published_model.parent) not in content
        assert str(run.parent.parent) not in content
    assert "bitpress run ~/secret/tiny.yaml" in hub.content(REPO, "README.md").decode()


def test_again(hub: Hub, run: Path) -> None:
    first = publish(run, REPO)
    before = receipt(run)
    (run / "publish.json").unlink()
    hub.requests.clear()
    again = publish(run, REPO)
    assert (again.state, again.revision) == ("already there", first.revision)
    assert receipt(run) == before
    assert written(hub) == []


def test_a_new_card_alone_is_sent_alone(hub: Hub, run: Path) -> None:
    publish(run, REPO)
    edit(run / "metrics.json", command="bitpress run other.yaml")
    hub.requests.clear()
    assert publish(run, REPO).state == "published"
    assert not [asked for asked in hub.requests if asked.startswith("PUT")]
    assert len(hub.repos[REPO].commits) == 3


def test_in_parts(hub: Hub, run: Path) -> None:
    hub.multipart = 10_000
    publish(run, REPO)
    name = "model-00001-of-00003.safetensors"
    assert len([asked for asked in hub.requests if "/part/" in asked]) == 13
    assert hub.content(REPO, name) == (run / "artifact" / name).read_bytes()


def test_a_dry_run_asks_nobody(hub: Hub, run: Path) -> None:
    found = publish(run, REPO, dry_run=True)
    assert (found.state, set(found.files), found.url) == ("dry run", UP, None)
    assert hub.requests == []
    assert not (run / "publish.json").exists()
    assert found.card.read_text().startswith("---\n")
    publish(run, REPO)
    assert hub.content(REPO, "README.md") == found.card.read_bytes()


class TestAllowList:
    def test_what_stays_here(self, hub: Hub, run: Path) -> None:
        artifact = run / "artifact"
        for name in (".env", ".hidden.json", "pytorch_model.bin", "notes.txt", "extra.safetensors", "run.py"):
            (artifact / name).write_text(f"secret = {CANARY}")
        (artifact / "linked.txt").symlink_to("/etc/hostname")
        manifest = json.loads((artifact / "bitpress.json").read_text())
        for name in ("notes.txt", "run.py", "pytorch_model.bin"):  # even what bitpress itself might have copied
            content = (artifact / name).read_bytes()
            manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (artifact / "bitpress.json").write_text(json.dumps(manifest))
        self.vouch(run)
        found = publish(run, REPO)
        assert set(found.files) == UP
        assert found.left_out == {
            ".env": "a hidden file",
            ".hidden.json": "a hidden file",
            "extra.safetensors": "not a file that bitpress wrote there",
            "linked.txt": "not a file that bitpress wrote there",
            "notes.txt": "not among the files that are published",
            "pytorch_model.bin": "not among the files that are published",
            "run.py": "not among the files that are published",
        }
        assert hub.repos[REPO].commits[-1][1].keys() - {".gitattributes"} == UP
        assert "notes.txt" not in json.loads(hub.content(REPO, "bitpress.json"))["files"]

    @staticmethod
    def vouch(run: Path) -> None:
        metrics = json.loads((run / "metrics.json").read_text())
        digest = hashlib.sha256((run / "artifact" / "bitpress.json").read_bytes()).hexdigest()
        edit(run / "metrics.json", fingerprint=metrics["fingerprint"] | {"artifact.sha256": digest})

    def refused(self, hub: Hub, run: Path, said: str) -> None:
        with pytest.raises(CheckpointError, match=said) as caught:
            publish(run, REPO)
        assert caught.value.exit_code == 3
        assert CANARY not in str(caught.value)
        assert hub.requests == []

    @pytest.mark.parametrize("name", ["artifact/model-00001-of-00003.safetensors", "artifact/LICENSE", "report.md"])
    def test_a_link(self, hub: Hub, run: Path, name: str) -> None:
        path = run / name
        path.rename(path.with_name("elsewhere"))
        path.symlink_to("elsewhere")
        self.refused(hub, run, f"{path.name} is a link, or no file: only plain files are published")

    def test_what_is_too_large(self, hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bundle, "LARGEST", 50_000)
        self.refused(hub, run, "model-00001-of-00003.safetensors has 65952 bytes, at most 50000 are published")
        monkeypatch.undo()
        monkeypatch.setattr(bundle, "LARGEST_TEXT", 5_000)
        self.refused(hub, run, "tokenizer.json has 5365 bytes, at most 5000 are published")

    def test_a_token_in_a_file(self, hub: Hub, run: Path) -> None:
        edit(run / "metrics.json", command=f"bitpress run --set a={CANARY}")
        self.refused(hub, run, r"metrics\.json holds a token of the Hub; take it out")

    def test_a_token_of_another_account(self, hub: Hub, run: Path) -> None:
        (run / "report.md").write_text("hf_" + "x" * 34)
        self.refused(hub, run, r"report\.md holds a token of the Hub")

    def test_a_damaged_artifact(self, hub: Hub, run: Path) -> None:
        path = run / "artifact" / "model-00002-of-00003.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        self.refused(hub, run, r"is unsound, so it stays here:\n.*model-00002-of-00003\.safetensors is not as it was")


class TestNotFinished:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (
                lambda run: (run / "metrics.json").unlink(),
                "is no finished run: it has no metrics.json; give",
            ),
            (lambda run: (run / "artifact" / "bitpress.json").unlink(), r"has no artifact/bitpress\.json"),
            (lambda run: edit(run / "artifact" / "bitpress.json", more=1), r"metrics\.json is of another artifact"),
            (lambda run: (run / "journal.jsonl").write_text("{}\n"), "line 1 is not as it was written"),
        ],
    )
    def test_refused(self, hub: Hub, run: Path, change: Callable[[Path], Any], said: str) -> None:
        change(run)
        with pytest.raises(ConfigError, match=said):
            publish(run, REPO)
        assert hub.requests == []

    def test_the_baseline(self, hub: Hub, runs: Path) -> None:
        with pytest.raises(ConfigError, match="is the unquantized baseline, which is published already"):
            publish(runs / "none", REPO)

    @pytest.mark.parametrize("repo", ["tiny", "a/b/c", "user/ti ny", "user/a\nb", "", "user/'--'"])
    def test_no_repository(self, hub: Hub, run: Path, repo: str) -> None:
        with pytest.raises(ConfigError, match=r"repository|Repo id|repo id"):
            publish(run, repo)
        assert hub.requests == []


class TestGates:
    @pytest.fixture
    def missing(self, run: Path) -> Path:
        """A run that misses a gate and passes one."""
        config = json.loads((run / "metrics.json").read_text())["config"]
        edit(run / "metrics.json", config=config | {"gates": {"kl_mean": 1e-6, "ppl_increase": 9.0}})
        return run

    def test_missed(self, hub: Hub, missing: Path) -> None:
        for dry_run in (True, False):
            with pytest.raises(GateError, match=r"mean KL is 0\.004\d+, but gates\.kl_mean .*; --override") as caught:
                publish(missing, REPO, dry_run=dry_run)
            assert caught.value.exit_code == 8
        assert hub.requests == []

    def test_overridden(self, hub: Hub, missing: Path) -> None:
        [sentence] = publish(missing, REPO, override=True).missed
        assert sentence.startswith("mean KL is 0.004")
        verdict = receipt(missing)["gates"]
        assert (verdict["passed"], verdict["overridden"]) == (False, True)
        card = hub.content(REPO, "README.md").decode()
        assert "**Published although** mean KL is 0.004" in card
        assert "missed, overridden" in card


class TestOthersFiles:
    def refused(self, run: Path, names: str) -> None:
        with pytest.raises(HubError, match=f"{REPO} holds files that are not of this run.*: {names}; nothing"):
            publish(run, REPO)

    def test_another_models(self, hub: Hub, run: Path) -> None:
        hub.put(REPO, "model.safetensors", b"somebody else's")
        hub.put(REPO, "config.json", b"{}")
        self.refused(run, "config.json, model.safetensors")
        assert written(hub) == []
        assert hub.content(REPO, "config.json") == b"{}"

    def test_a_card_that_was_written_there(self, hub: Hub, run: Path) -> None:
        publish(run, REPO)
        hub.put(REPO, "README.md", b"by hand")
        self.refused(run, "README.md")
        assert hub.content(REPO, "README.md") == b"by hand"

    def test_what_does_not_meet_ours(self, hub: Hub, run: Path) -> None:
        hub.put(REPO, "example.py", b"print()")
        publish(run, REPO)
        assert hub.content(REPO, "example.py") == b"print()"


def test_private(hub: Hub, run: Path) -> None:
    publish(run, REPO, private=True)
    assert hub.repos[REPO].private
    assert publish(run, REPO, private=True).state == "already there"
    hub.repos[REPO].private = False
    with pytest.raises(HubError, match="is public; make it private in its settings, or leave --private out"):
        publish(run, REPO, private=True)


def test_without_a_token(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="there is no token for the Hub: `hf auth login`, or set HF_TOKEN"):
        publish(run, REPO)
    assert hub.requests == []


def test_the_command(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    (run / "artifact" / ".env").write_text("x")
    for options, words in (
        (["--dry-run"], "dry run: user/tiny-int4; its card is"),
        ([], "published: http://127.0.0.1"),
    ):
        monkeypatch.setattr(sys, "argv", ["bitpress", "publish", str(run), "--repo", REPO, *options])
        with pytest.raises(SystemExit) as stop:
            app.main()
        assert stop.value.code == 0
        said = capfd.readouterr()
        assert "model-00001-of-00003.safetensors  66.0 kB" in said.out
        assert words in said.out
        assert "stays here: .env, a hidden file" in said.err
        assert CANARY not in said.out + said.err


class TestBatch:
    def test_a_sweep_in_a_collection(
        self, hub: Hub, make_run: Callable[..., Run], tmp_path: Path, in_process: None
    ) -> None:
        """What misses its gate stays here; the others go, and again, nothing is sent twice."""
        where = Publish(repo="user/{model}-{recipe}", private=True, collection="Tiny things")
        config = make_run(tmp_path, recipes=["int4-g32", "int8-dynamic"], gates=Gates(kl_mean=0.002), publish=where)
        news: list[str] = []
        outcomes = {outcome.recipe: outcome for outcome in execute(config, "bitpress run", news.append)}
        assert isinstance(outcomes["int4-g32"].error, GateError)
        assert outcomes["int4-g32"].published is None
        assert outcomes["none"].published is None
        assert outcomes["int8-dynamic"].published == f"{hub.url}/user/tiny-int8-dynamic"
        assert set(hub.repos) == {"user/tiny-int8-dynamic"}
        [collection] = hub.collections.values()
        assert ([item["id"] for item in collection["items"]], collection["private"]) == (
            ["user/tiny-int8-dynamic"],
            True,
        )
        assert receipt(tmp_path / "tiny" / "int8-dynamic")["collection"] == collection["slug"]

        again = execute(config, "bitpress run", news.append, override=True)
        assert [outcome.error for outcome in again] == [None] * 3
        assert set(hub.repos) == {"user/tiny-int8-dynamic", "user/tiny-int4-g32"}
        assert len(collection["items"]) == 2
        assert any(line.endswith(f"already there: {hub.url}/user/tiny-int8-dynamic") for line in news)
        assert receipt(tmp_path / "tiny" / "int4-g32")["gates"]["overridden"] is True

    def test_one_that_fails_is_told(
        self, hub: Hub, make_run: Callable[..., Run], tmp_path: Path, in_process: None
    ) -> None:
        hub.fail("/commit/", status=403)
        config = make_run(tmp_path, recipes=["int8-dynamic"], publish=Publish(repo="user/x"))
        outcomes = execute(config, "bitpress run", lambda line: None)
        assert [type(outcome.error) for outcome in outcomes] == [type(None), HubError]
        assert outcomes[1].metrics


@pytest.mark.parametrize("folder", ["/srv/mine", "'/srv/my own'", "'a'\"'\"'b'", "&#39;/srv/my own&#39;"])
def test_the_folder_of_a_command_stays_here(folder: str) -> None:
    config = {
        "output": "runs",
        "eval": {"text": "a.txt"},
        "models": [],
        "defaults": {"calibration": None},
        "recipes": [],
    }
    for joint in ("&&", "&amp;&amp;"):
        assert (
            bundle.without_paths(f"<pre>cd {folder} {joint} bitpress run x.yaml", config) == "<pre>bitpress run x.yaml"
        )
