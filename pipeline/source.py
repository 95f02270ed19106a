"""Where a model comes from: a local folder, the Hugging Face Hub, or bitpress itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .checkpoint import INDEX, SINGLE, read_json
from .errors import ConfigError, HubError

DEMO = "builtin:demo"
_COMPANIONS = ["*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "NOTICE*"]
HUB_ERRORS = (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, HFValidationError)


@dataclass(frozen=True)
class Source:
    """A checkpoint on this disk. `revision` is the Hub's commit, None for a local folder."""

    id: str
    revision: str | None
    folder: Path

    def to_dict(self) -> dict[str, Any]:
        return {"id": self.id, "revision": self.revision}

    def check_output(self, out: Path) -> None:
        """Raises ConfigError if `out` would lie among the checkpoint's own files."""
        if out.resolve().is_relative_to(self.folder.resolve()):
            raise ConfigError(f"the output {out} lies in the checkpoint's own folder; choose another")


def resolve(model: str, revision: str | None = None) -> Source:
    """Find a model, downloading it from the Hub where it is not a local folder.

    Raises:
        ConfigError: it is neither a folder nor a Hub id. HubError: the Hub refused or could not be reached.
    """
    if model == DEMO:
        return Source(DEMO, None, Path(__file__).parent / "demo_model")
    path = Path(model).expanduser()
    if path.is_dir():
        if revision:
            raise ConfigError(f"{model} is a local folder, which has no revision {revision}; leave revision out")
        return Source(path.resolve().name, None, path)
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ConfigError(f"{model} is neither a folder nor a Hub id such as org/name")
    return _from_hub(model, revision)


def _from_hub(model: str, revision: str | None) -> Source:
    """The commit is settled by the first, small download; what is in the local cache serves where the Hub is away."""
    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=_COMPANIONS))
        weights = [SINGLE]
        if (folder / INDEX).exists():
            weights = sorted({str(name) for name in read_json(folder / INDEX).get("weight_map", {}).values()})
        folder = Path(snapshot_download(model, revision=folder.name, allow_patterns=[*weights, *_COMPANIONS]))
    except HUB_ERRORS as error:
        raise HubError(explain_hub(error, model, revision)) from error
    return Source(model, folder.name, folder)


def explain_hub(error: Exception, name: str, revision: str | None = None) -> str:
    """A sentence on why the Hub did not give something, and what to do."""
    if isinstance(error, GatedRepoError):
        return f"{name} is gated: accept its terms on its page, then `hf auth login` with an account that may read it"
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no revision {revision}; look up its branches, tags and commits on its page"
    if isinstance(error, RepositoryNotFoundError):
        return f"{name} is not on the Hub, or is private: check the spelling, or `hf auth login`"
    if isinstance(error, HfHubHTTPError):
        return f"the Hub answered {error.response.status_code} for {name}; try again later"
    if isinstance(error, HFValidationError):
        return f"{name} is not a Hub id: {error}"
    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"{name} is not in the local cache, and HF_HUB_OFFLINE forbids asking the Hub; unset it, or give a folder"
        )
    return (
        f"the Hub could not be reached for {name} ({type(error).__name__}); check the network, or give a local folder"
    )
