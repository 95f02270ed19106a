"""Text to measure on, and its tokens."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import Dataset
from .errors import ConfigError, HubError, NumericsError
from .source import explain_hub

PYDOC_TOPICS = "builtin:pydoc-topics"
_JOIN = "\n\n"  # GPTQ's protocol joins documents by a blank line


@dataclass(frozen=True)
class Text:
    """name: what the report calls it; sha256: of its UTF-8 bytes."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


def read_text(source: str | Dataset) -> Text:
    """Text from a file (.txt, .md, .jsonl or .parquet with a "text" column), a Hub data set, or Python itself.

    Raises:
        ConfigError: no such file or kind. HubError: the data set could not be had. NumericsError: there is no text in it.
    """
    if isinstance(source, Dataset):
        name = "/".join(filter(None, (source.dataset, source.config, source.split)))
        content = _JOIN.join(_dataset(source))
    elif source == PYDOC_TOPICS:
        from pydoc_data.topics import topics

        name, content = source, _JOIN.join(topics[key] for key in sorted(topics))
    else:
        name, content = Path(source).name, _file(Path(source).expanduser())
    if not content.strip():
        raise NumericsError(f"{name} holds no text; give a file with some")
    return Text(name, content)


def _file(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(f"{path}: no such text file; give a .txt, .jsonl or .parquet file, or {PYDOC_TOPICS}")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise ConfigError(f"{path}: parquet needs the pyarrow package; pip install 'bitpress[hub]'") from error
        return _JOIN.join(pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist())
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise NumericsError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from error
    if path.suffix != ".jsonl":
        return content
    try:
        return _JOIN.join(_strings(json.loads(line)["text"] for line in content.splitlines() if line.strip()))
    except (ValueError, KeyError, TypeError) as error:
        raise NumericsError(f'{path}: every line must be a JSON object with a "text": {error}') from error


def _strings(values: Iterable[Any]) -> list[str]:
    return [value if isinstance(value, str) else str(value) for value in values]


def _dataset(source: Dataset) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError("a Hub data set needs the datasets package; pip install 'bitpress[hub]'") from error
    try:
        rows = load_dataset(source.dataset, source.config, split=source.split, revision=source.revision)
        return _strings(rows[source.column])
    except (OSError, RuntimeError) as error:  # datasets' own and huggingface_hub's errors are among these
        raise HubError(explain_hub(error, source.dataset, source.revision)) from error
    except (KeyError, ValueError) as error:
        raise ConfigError(f"data set {source.dataset}: {error}") from error


def tokenize(tokenizer: Any, text: Text, context: int) -> Tensor:
    """Token ids int64 [n], in one tokenization.

    Raises:
        NumericsError: it fills no window of `context` tokens.
    """
    ids = torch.tensor(tokenizer(text.content, verbose=False)["input_ids"], dtype=torch.int64)
    if ids.numel() < context:
        raise NumericsError(
            f"{text.name} has {ids.numel()} tokens, at least one window of {context} is needed; "
            "give more text, or set eval.context lower"
        )
    return ids
