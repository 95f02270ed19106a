"""Uploads a finished run to a repository on the Hub, in one commit. Nothing else of bitpress writes there."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import get_session

from bitpress.eval.report.report import pictures
from bitpress.eval.report.words import printable, size, terms_html

from ..checkpoints.doctor import diagnose
from ..config.schema import BASELINE, Gates, check_repo
from ..errors import CheckpointError, ConfigError, GateError, HubError, listing
from ..evaluate import gates
from ..evaluate.metrics import METRICS, read_metrics
from ..hub.errors import HUB_ERRORS, seconds_to_wait, upload_error
from ..storage import files as store
from ..storage import journal
from ..storage.checkpoint import WEIGHT_SUFFIXES, read_json
from ..storage.fingerprint import MANIFEST
from ..system.progress import OnStep
from ..system.redact import has_token
from .bundle import CARD, Bundle, Item, add_manifest, make_bundle, without_paths
from .card import origin_of, write_card

RECEIPT = "publish.json"
SHOWN = "card.md"  # the card as it lies in the run's folder
FIGURES = "figures"  # its pictures, beside it there and on the Hub
PATIENCE = 60.0  # seconds of silence after which a connection counts as lost
WAITS = (1, 2, 4)  # seconds before each further try, where the Hub does not say
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Publication:
    """What was, or would be, published.

    state: "dry run", "published" or "already there". files: name -> bytes. left_out: file of the artifact that stays
    here -> why. missed: a sentence for each gate that was missed and overridden. revision: the commit on the Hub.
    """

    repo: str
    state: str
    files: dict[str, int]
    left_out: dict[str, str]
    missed: list[str]
    card: Path
    url: str | None = None
    revision: str | None = None

    def _repr_html_(self) -> str:
        rows = [("state", self.state), ("repository", self.url or self.repo), ("card", self.card)]
        rows += [(name, size(nbytes)) for name, nbytes in self.files.items()]
        return terms_html("Publication", [*rows, *(("gate missed", sentence) for sentence in self.missed)])


@dataclass(frozen=True)
class Upload:
    """A run that may be published, with everything that is sent. verdict: the gates'; None without gates."""

    run: Path
    repo: str
    bundle: Bundle
    verdict: dict[str, Any] | None

    def publication(self, state: str, url: str | None = None, revision: str | None = None) -> Publication:
        """What to tell the user of this upload."""
        files = {item.name: item.size for item in self.bundle.items}
        missed = gates.missed(self.verdict["judged"]) if self.verdict else []
        return Publication(self.repo, state, files, self.bundle.left_out, missed, self.run / SHOWN, url, revision)


def prepare(run: Path, repo: str, override: bool, on_step: OnStep = lambda done, total: None) -> Upload:
    """Everything that needs no network: checks that the run is whole, asks the gates, and writes the card.

    Raises:
        ConfigError: it is no finished run of a quantized model, or `repo` is no name of a repository.
        GateError: it misses a gate, and `override` is False.
        CheckpointError: its artifact is unsound, or a file may not be published.
    """
    try:
        check_repo(repo)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    metrics = _finished(run)
    verdict = gates.verdict(Gates.model_validate(metrics["config"]["gates"]), metrics, override)
    if verdict and not (verdict["passed"] or override):
        missed = "; ".join(gates.missed(verdict["judged"]))
        raise GateError(f"{missed}; --override publishes it all the same, and its card says so")
    diagnosis = diagnose(run / "artifact", on_step)
    if not diagnosis.sound:
        raise CheckpointError(f"{run / 'artifact'} is unsound, so it stays here:\n{listing(diagnosis.faults)}")
    bundle = make_bundle(run, metrics["config"])
    baseline = run.parent / BASELINE / METRICS
    runs = [
        *([_metrics_without_paths(baseline)] if baseline.exists() else []),
        _metrics_without_paths(run / METRICS) | {"gates": verdict},
    ]
    origin = origin_of(metrics, run / "artifact" / CARD, [item.name for item in bundle.items])
    figures = {f"{FIGURES}/{number}.png": figure for number, figure in enumerate(pictures(printable(runs)), 1)}
    store.make_folder(run / FIGURES)
    for name, (_, png) in figures.items():
        bundle.add(name, png)
        store.write_file(run / name, [png])
    captions = {name: caption for name, (caption, _) in figures.items()}
    card = write_card(repo, runs, origin, diagnosis.runtimes, bundle.items, captions)
    if has_token(card.encode()):
        raise CheckpointError(f"{run}: its config or command holds a token of the Hub; revoke the token")
    store.write_text(run / SHOWN, card)
    bundle.add(CARD, card)
    add_manifest(bundle, run)
    return Upload(run, repo, bundle, verdict)


def _finished(run: Path) -> dict[str, Any]:
    """The metrics of a run that is done, and of the artifact that lies there."""
    advice = "give the folder of one recipe that `bitpress run` finished, such as runs/demo/int4-g128"
    if not (run / METRICS).is_file():
        raise ConfigError(f"{run} is no finished run: it has no metrics.json; {advice}")
    metrics = read_metrics(run / METRICS)
    if metrics["scheme"] == BASELINE:
        raise ConfigError(f"{run} is the unquantized baseline, which is published already; {advice}")
    manifest = run / "artifact" / MANIFEST
    if not manifest.is_file():
        raise ConfigError(f"{run} has no artifact/{MANIFEST}; {advice}")
    journal.Journal(run / journal.NAME)
    return metrics


def _metrics_without_paths(path: Path) -> dict[str, Any]:
    """Metrics without this machine's folders."""
    text = path.read_text(encoding="utf-8")
    return json.loads(without_paths(text, json.loads(text)["config"]))


def send(upload: Upload, private: bool = False, collection: str | None = None) -> Publication:
    """Send what the repository does not have yet in one commit, compare all hashes, and leave a receipt.

    A rerun goes on where an earlier one broke off.

    Raises:
        HubError: what stands in the way; nothing on the Hub was overwritten, and what is uploaded is kept there.
    """
    path = upload.run / RECEIPT
    with journal.locked(upload.run), _bounded_waits():
        hub = _Hub(upload.repo)
        hub.create(private)
        receipt, now = _receipt(upload), hub.state()
        if missing := _missing(receipt, now):
            _refuse_files_of_others(receipt, read_json(path) if path.exists() else {}, now)
            store.write_json(path, receipt)  # whatever happens next, a rerun knows whose files these are
            now = _commit(hub, upload, receipt, missing, now.revision)
            store.write_json(path, receipt | {"revision": now.revision})
            if wrong := _missing(receipt, now):
                raise HubError(f"{hub.repo} does not hold what was sent: {', '.join(wrong)}; run again to mend that")
        receipt |= {"revision": now.revision, "time": now.time, "private": now.private}
        store.write_json(path, receipt)
        if collection:
            store.write_json(path, receipt | {"collection": hub.collect(collection, private)})
        return upload.publication("published" if missing else "already there", hub.url, now.revision)


def _commit(hub: "_Hub", upload: Upload, receipt: dict[str, Any], missing: list[str], parent: str) -> "_State":
    """Send what is missing, on top of the commit `parent`."""
    try:
        return hub.state(hub.commit([item for item in upload.bundle.items if item.name in missing], parent))
    except HubError:
        now = hub.state()
        if _missing(receipt, now):
            raise
        return now  # it was the answer that got lost, not the commit


def _missing(receipt: dict[str, Any], state: "_State") -> list[str]:
    return [name for name, entry in receipt["files"].items() if not _holds(state.files.get(name), entry)]


def _receipt(upload: Upload) -> dict[str, Any]:
    """publish.json, as it is before anything is sent; the commit, and what the Hub says of it, come later."""
    items = upload.bundle.items
    return {
        "repo": upload.repo,
        "revision": None,
        "time": None,
        "private": None,
        "collection": None,
        "gates": upload.verdict,
        "card_sha256": next(item.sha256 for item in items if item.name == CARD),
        "files": {item.name: {"bytes": item.size, "sha256": item.sha256, "blob": item.blob()} for item in items},
        "versions": {name: version(name) for name in ("bitpress", "huggingface_hub")},
    }


def _holds(file: RepoSibling | None, entry: dict[str, Any] | None) -> bool:
    """Whether a file on the Hub is the one that a receipt has."""
    if file is None or entry is None or file.size != entry["bytes"]:
        return False
    return file.lfs.sha256 == entry["sha256"] if file.lfs else file.blob_id == entry["blob"]


def _refuse_files_of_others(receipt: dict[str, Any], before: dict[str, Any], now: "_State") -> None:
    """Nothing that somebody else put there is overwritten, and no weights are left beside ours.

    Args:
        receipt: of what is sent. before: the receipt of what was sent earlier.
    Raises:
        HubError: names the files.
    """
    ours, earlier = receipt["files"], before["files"] if before.get("repo") == receipt["repo"] else {}
    strange = {name for name in now.files if name.endswith(WEIGHT_SUFFIXES) and name not in ours}
    if not earlier or before.get("revision") != now.revision:
        for name, file in now.files.items():
            if name in ours and not any(_holds(file, entries.get(name)) for entries in (ours, earlier)):
                strange.add(name)
    if strange:
        raise HubError(
            f"{receipt['repo']} holds files that are not of this run, or were changed there since: "
            f"{', '.join(sorted(strange))}; nothing was uploaded. Publish to another repository, or delete them there"
        )


@contextlib.contextmanager
def _bounded_waits() -> Iterator[None]:
    """The client itself would wait for ever."""
    session = get_session()
    was, session.timeout = session.timeout, PATIENCE
    try:
        yield
    finally:
        session.timeout = was


@dataclass(frozen=True)
class _State:
    """A repository as of a commit; time is when it was last written, by the Hub's clock."""

    revision: str
    time: str | None
    private: bool
    files: dict[str, RepoSibling]


class _Hub:
    """One repository on the Hub; each failure of huggingface_hub's client becomes a HubError of ours."""

    def __init__(self, repo: str):
        if get_token() is None:
            raise HubError("there is no token for the Hub: `hf auth login`, or set HF_TOKEN to one that may write")
        self.repo = repo
        self.api = HfApi(token=True)  # the client looks it up by itself, each time
        self.url = f"{self.api.endpoint}/{repo}"
        self.account = ""  # until the Hub says whose token it is
        self.account = self._ask(lambda: str(self.api.whoami()["name"]))

    def _ask(self, call: Callable[[], Answer], waits: Sequence[float] = WAITS) -> Answer:
        """What the client answers; a request is sent again where that may help.

        Raises:
            HubError: without the client's own error, whose text is the server's.
        """
        for wait in (*waits, None):
            try:
                return call()
            except HUB_ERRORS as error:
                seconds = seconds_to_wait(error, wait)
                if seconds is None:
                    raise upload_error(error, self.repo, self.account) from None
                time.sleep(seconds)
        raise AssertionError("the last wait is None")

    def create(self, private: bool) -> None:
        """Create the repository, unless it exists. Where it is not to be private, the owner's default holds."""
        self._ask(lambda: self.api.create_repo(self.repo, private=private or None, exist_ok=True))
        if private and not self.state().private:
            raise HubError(f"{self.repo} is public; make it private in its settings, or leave --private out")

    def state(self, revision: str | None = None) -> "_State":
        """The repository as of a commit, the newest by default."""
        return self._ask(lambda: self._state(revision))

    def _state(self, revision: str | None) -> "_State":
        info = self.api.model_info(self.repo, revision=revision, files_metadata=True, timeout=PATIENCE)
        if not info.sha or info.siblings is None:
            raise ValueError("the answer names no commit, or no files")
        when = info.last_modified.isoformat() if info.last_modified else None
        return _State(info.sha, when, bool(info.private), {file.rfilename: file for file in info.siblings})

    def commit(self, items: Sequence[Item], parent: str) -> str:
        """Upload the files, going on where an earlier call broke off; then commit them all at once.

        The Hub refuses the commit if somebody else committed meanwhile.
        """
        contents = [item.content if isinstance(item.content, bytes) else str(item.content) for item in items]
        added = [CommitOperationAdd(item.name, content) for item, content in zip(items, contents, strict=True)]
        self._ask(lambda: self.api.preupload_lfs_files(self.repo, added, free_memory=False), waits=())
        message = f"Published by bitpress {version('bitpress')}"
        commit = self._ask(
            lambda: self.api.create_commit(self.repo, added, commit_message=message, parent_commit=parent)
        )
        return commit.oid

    def collect(self, title: str, private: bool) -> str:
        """Add the repository to a collection of its owner, created where there is none; returns the slug of that."""
        owner = self.repo.split("/")[0]
        collection = self._ask(
            lambda: self.api.create_collection(title, namespace=owner, private=private, exists_ok=True)
        )
        self._ask(lambda: self.api.add_collection_item(collection.slug, self.repo, "model", exists_ok=True))
        return collection.slug
