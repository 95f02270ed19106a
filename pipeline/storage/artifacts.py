"""The checkpoint that a folder means: the folder itself, or the artifact of the run that it is of; its tokenizer."""

from pathlib import Path

from ..errors import CheckpointError, ConfigError, listing
from .checkpoint import INDEX, SINGLE
from .gguf.source import container, unpacked

DEMO = "builtin:demo"
ARTIFACT = "artifact"  # in the folder of a recipe's run
METRICS = "metrics.json"  # likewise
# a folder with none of these has no tokenizer
TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json",
)  # fmt: skip


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds weights."""
    return (folder / SINGLE).exists() or (folder / INDEX).exists() or any(folder.glob("*.gguf"))


def local_checkpoint(model: str | Path) -> Path:
    """The checkpoint's folder that a path means, or `builtin:demo`.

    A GGUF file of another program, or a folder with one and no config.json, means what it is unpacked to in the cache.
    The folder of a recipe's run (runs/NAME/RECIPE) means the artifact in it, and that of a whole run (runs/NAME) the
    artifact of its only recipe. A path that is neither, or does not exist, means itself.

    Raises:
        CheckpointError: a GGUF file that holds no model known here.
        ConfigError: a run of several recipes; a run of the baseline alone, which has no weights of its own.
    """
    if str(model) == DEMO:
        return (Path(__file__).parents[1] / "demo_model" / "config.json").resolve().parent
    folder = Path(model)
    if (file := container(folder)) is not None:
        return unpacked(file)
    if is_checkpoint(folder) or not folder.is_dir():
        return folder
    if (folder / ARTIFACT).is_dir():
        return folder / ARTIFACT
    if (folder / METRICS).exists():
        raise ConfigError(
            f"{folder} is a run of an unquantized model, so it holds figures and no weights; name the model itself"
        )
    below = (path for deep in ("*", "*/*") for path in folder.glob(f"{deep}/{ARTIFACT}") if path.is_dir())
    artifacts = sorted(path for path in below if is_checkpoint(path))
    if len(artifacts) > 1:
        runs = listing([str(path.parent) for path in artifacts])
        raise ConfigError(f"{folder} is a run of {len(artifacts)} recipes; name one of them:\n{runs}")
    return artifacts[0] if artifacts else folder


def require_tokenizer(folder: Path) -> None:
    """Raises CheckpointError where a folder has no tokenizer, before anything is made of its weights."""
    if not any((folder / name).exists() for name in TOKENIZERS):
        raise CheckpointError(
            f"{folder} has no tokenizer: none of {', '.join(TOKENIZERS)} is there; copy the files of the model's "
            "tokenizer into the folder"
        )
