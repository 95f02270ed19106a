"""Finds a model: in a local folder, on the Hugging Face Hub, or in bitpress itself."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub  # its functions bring all of it, which takes its time, when they are called
from huggingface_hub.errors import LocalEntryNotFoundError

from ..errors import CheckpointError, ConfigError
from ..storage.artifacts import DEMO, local_checkpoint
from ..storage.checkpoint import INDEX, SINGLE, read_json
from ..storage.gguf.source import container
from .errors import HUB_ERRORS, download_error

_COMPANIONS = ["*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "NOTICE*"]


@dataclass(frozen=True)
class Source:
    """A checkpoint on this disk. `revision` is the Hub's commit, None for a local folder."""

    id: str
    revision: str | None
    folder: Path

    def to_dict(self) -> dict[str, Any]:
        return {"id": self.id, "revision": self.revision}

    def check_output(self, out: Path) -> None:
        """Refuse an output folder among the checkpoint's own files.

        Raises:
            ConfigError: `out` lies there.
        """
        if out.resolve().is_relative_to(self.folder.resolve()):
            raise ConfigError(f"the output {out} lies in the checkpoint's own folder; choose another")


def resolve(model: str, revision: str | None = None) -> Source:
    """Find a model, downloading it from the Hub where it is not a local folder. A run's folder means its artifact.

    Raises:
        ConfigError: it is neither a folder nor a Hub id. HubError: the Hub refused or could not be reached.
        CheckpointError: it holds no safetensors. DiskError: the Hub's cache cannot be written.
    """
    if model == DEMO:
        return Source(DEMO, None, local_checkpoint(DEMO))
    path = Path(os.path.expanduser(model))  # unlike Path.expanduser, it lets an unknown ~user be
    if model and (os.path.isdir(path) or container(path)):
        if revision:
            raise ConfigError(f"{model} is a local folder, which has no revision {revision}; leave revision out")
        return Source(path.resolve().name, None, local_checkpoint(path))
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ConfigError(f"{model!r} is neither a folder nor a Hub id such as org/name")
    return _from_hub(model, revision)


def local(model: str, revision: str | None = None) -> Source | None:
    """A model whose files are on this machine; None where `resolve` would have to download some.

    Raises:
        ConfigError: it is neither a folder nor a Hub id.
    """
    path = Path(os.path.expanduser(model))
    if model == DEMO or os.path.isdir(path) or container(path) or model.count("/") != 1 or model[0] in "./~":
        return resolve(model, revision)
    try:
        folder = Path(huggingface_hub.snapshot_download(model, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HUB_ERRORS as error:
        raise download_error(error, model, revision) from error
    complete = all((folder / name).exists() for name in ("config.json", *_weight_files(folder)))
    return Source(model, folder.name, folder) if complete else None


def _from_hub(model: str, revision: str | None) -> Source:
    """Download a model; the first, small download settles the commit. Without the Hub, the local cache serves."""
    try:
        folder = Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=_COMPANIONS))
        wanted = [*_COMPANIONS, *_weight_files(folder)]
        folder = Path(huggingface_hub.snapshot_download(model, revision=folder.name, allow_patterns=wanted))
    except HUB_ERRORS as error:
        raise download_error(error, model, revision) from error
    if not (folder / INDEX).exists() and not (folder / SINGLE).exists():
        raise CheckpointError(
            f"{model} has no {SINGLE} on the Hub, sharded or not, and bitpress reads nothing else (pickles can run "
            "code); choose a model or a revision that has it"
        )
    return Source(model, folder.name, folder)


def _weight_files(folder: Path) -> list[str]:
    """The weight files that the index names. Whatever else is wrong with an index, Checkpoint reports."""
    if not (folder / INDEX).exists():
        return [SINGLE]
    weight_map = read_json(folder / INDEX).get("weight_map")
    names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    return sorted(name for name in names if not set("*?[") & set(name))  # the client takes such names for patterns
