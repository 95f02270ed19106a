"""The files of a finished run that may go to the Hub: an allow-list, every file with its size and hashes."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, listing
from ..evaluate.metrics import METRICS, sealed
from ..storage.checkpoint import INDEX, WEIGHT_SUFFIXES, Checkpoint, read_json
from ..storage.fingerprint import MANIFEST
from ..system.redact import has_token
from .vocabulary import is_licence_file

CARD = "README.md"
LARGEST = 50 * 10**9  # bytes; the Hub takes no larger file
LARGEST_TEXT = 64 * 10**6  # bytes of a file other than weights; the largest tokenizers have some 35 MB
_LARGEST_IN_GIT = 10 * 10**6  # bytes; the Hub keeps larger files outside of git
_ALLOWED = (
    "config.json", "generation_config.json", "quantize_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_REPORTS = (METRICS, "report.md", "report.html")


@dataclass(frozen=True)
class Item:
    """A file to send: its name in the repository, its bytes or where they lie, its size in bytes and its sha256."""

    name: str
    content: Path | bytes
    size: int
    sha256: str

    @staticmethod
    def of(name: str, content: bytes) -> "Item":
        return Item(name, content, len(content), hashlib.sha256(content).hexdigest())

    def blob(self) -> str | None:
        """The SHA-1 by which git names these bytes; None where they are too many for the Hub to keep in git."""
        if self.size > _LARGEST_IN_GIT:
            return None
        content = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return hashlib.sha1(b"blob %d\0" % self.size + content, usedforsecurity=False).hexdigest()


@dataclass
class Bundle:
    """Everything that goes up. left_out: file of the run's artifact -> why it stays here."""

    items: list[Item] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, content: str | bytes) -> None:
        """Put a file in, in the place of one with the same name."""
        item = Item.of(name, content.encode() if isinstance(content, str) else content)
        self.items = [other for other in self.items if other.name != name] + [item]


def make_bundle(run: Path, config: Mapping[str, Any]) -> Bundle:
    """The artifact's files that may be published, and the run's reports, in which no path of this machine is left.

    Args:
        run: folder of a finished run. config: the one that it was made by, as metrics.json has it.
    Raises:
        CheckpointError: a file is a link, too large, or holds a token.
    """
    artifact, bundle = run / "artifact", Bundle()
    listed = read_json(artifact / MANIFEST)["files"]
    weights = {file.name for file in Checkpoint(artifact).files} | {INDEX}
    faults = []
    for path in sorted(artifact.iterdir()):
        name = path.name
        allowed = name in weights or name in _ALLOWED or is_licence_file(name)
        if name not in listed or not allowed:
            if name not in (MANIFEST, CARD):  # both are written anew
                bundle.left_out[name] = _why_left_out(name, name in listed)
        elif fault := _fault(path, name in weights):
            faults.append(fault)
        else:
            bundle.items.append(Item(name, path, listed[name]["bytes"], listed[name]["sha256"]))
    for path in (run / name for name in _REPORTS):
        if fault := _fault(path, weights=False):
            faults.append(fault)
        else:
            text = without_paths(path.read_text(encoding="utf-8"), config)
            if path.name == METRICS:
                text = json.dumps(sealed(json.loads(text)), indent=2, ensure_ascii=False) + "\n"
            bundle.add(path.name, text)
    if faults:
        raise CheckpointError(f"{run} cannot be published:\n{listing(faults)}")
    return bundle


def add_manifest(bundle: Bundle, run: Path) -> None:
    """Add the run's manifest with the hashes of what goes up, so that everyone who downloads it can check them."""
    manifest: dict[str, Any] = read_json(run / "artifact" / MANIFEST)
    sent = {item.name: {"bytes": item.size, "sha256": item.sha256} for item in bundle.items}
    names = sorted({*manifest["files"], CARD} & sent.keys())
    bundle.add(MANIFEST, json.dumps(manifest | {"files": {name: sent[name] for name in names}}, indent=2) + "\n")
    bundle.items.sort(key=lambda item: item.name)


# as console.command_line writes it, and as it stands in HTML and in JSON
_TYPED_IN = re.compile(r"\bcd [^\n]{1,4096}? (?:&&|&amp;&amp;) bitpress ")


def without_paths(text: str, config: Mapping[str, Any]) -> str:
    """The text without this machine's folders, which a published command or config need not tell.

    The folder that a command was typed in is left out, an absolute path of the config is cut to its last part, and the
    user's own folder is written as ~.
    """
    text = _TYPED_IN.sub("bitpress ", text)
    calibrations = [part["calibration"] for part in (config["defaults"], *config["recipes"]) if part["calibration"]]
    named = [config["output"], config["eval"]["text"], *(each["text"] for each in calibrations)]
    named += [model["id"] for model in config["models"]]
    paths = [path for path in named if isinstance(path, str) and Path(path).is_absolute()]
    for path in sorted(paths, key=len, reverse=True):
        text = text.replace(path, Path(path).name)
    home = str(Path.home())
    return text if home == Path.home().anchor else re.sub(re.escape(home) + r"(?![\w.-])", "~", text)


def _why_left_out(name: str, listed: bool) -> str:
    if name.startswith("."):
        return "a hidden file"
    return "not among the files that are published" if listed else "not a file that bitpress wrote there"


def _fault(path: Path, weights: bool) -> str | None:
    """Why a file may not be published; None if it may."""
    if path.is_symlink() or not path.is_file():
        return f"{path.name} is a link, or no file: only plain files are published; put a copy in its place"
    limit = LARGEST if weights and path.suffix in WEIGHT_SUFFIXES else LARGEST_TEXT
    if (size := path.stat().st_size) > limit:
        return f"{path.name} has {size} bytes, at most {limit} are published"
    if not weights and has_token(path.read_bytes()):
        return f"{path.name} holds a token of the Hub; take it out, and revoke the token"
    return None
