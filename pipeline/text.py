"""Text to measure on, and its tokens."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HTTPError
from torch import Tensor

from .config import Dataset
from .errors import ConfigError, HubError, NumericsError

PYDOC_TOPICS = "builtin:pydoc-topics"
_JOIN = "\n\n"  # GPTQ's protocol joins documents by a blank line
_SURROGATE = re.compile("[\ud800-\udfff]")  # which JSON's \\u escapes can bring, and UTF-8 cannot hold


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
        ConfigError: no such file or kind. HubError: the data set could not be had. NumericsError: it holds no text.
    """
    if isinstance(source, Dataset):
        name = "/".join(filter(None, (source.dataset, source.config, source.split)))
        content = _joined(_dataset(source), name)
    elif source == PYDOC_TOPICS:
        from pydoc_data.topics import topics

        name, content = source, _JOIN.join(topics[key] for key in sorted(topics))
    else:
        name, content = Path(source).name, _file(Path(os.path.expanduser(source)))
    if not content.strip():
        raise NumericsError(f"{name} holds no text; give a file with some")
    if match := _SURROGATE.search(content):
        raise NumericsError(f"{name}: half a surrogate pair (U+{ord(match[0]):04X}) is no text; mend it first")
    return Text(name, content)


def _file(path: Path) -> str:
    if not os.path.isfile(path):
        raise ConfigError(f"{path}: no such text file; give a .txt, .jsonl or .parquet file, or {PYDOC_TOPICS}")
    if path.suffix == ".parquet":
        return _joined(_parquet(path), str(path))
    try:
        content = path.read_text(encoding="utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        raise NumericsError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    return _joined(_json_lines(path, content), str(path)) if path.suffix == ".jsonl" else content


def _parquet(path: Path) -> list[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"{path}: parquet needs the pyarrow package; pip install 'bitpress[hub]'") from error
    try:
        return pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()
    except (pyarrow.ArrowException, KeyError, OSError) as error:
        raise NumericsError(f'{path}: not a parquet file with a column "text": {error}') from error


def _json_lines(path: Path, content: str) -> list[Any]:
    documents = []
    for number, line in enumerate(content.split("\n"), 1):  # splitlines() would also split at U+2028, within strings
        try:
            documents += [json.loads(line)["text"]] if line.strip() else []
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise NumericsError(f'{path}, line {number}: expected a JSON object with a "text": {error}') from error
    return documents


def _joined(documents: Iterable[Any], name: str) -> str:
    documents = list(documents)
    for number, document in enumerate(documents, 1):
        if not isinstance(document, str):
            raise NumericsError(f"{name}: row {number} holds {document!r:.40}, expected text")
    return _JOIN.join(documents)


def _dataset(source: Dataset) -> list[Any]:
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ConfigError("a Hub data set needs the datasets package; pip install 'bitpress[hub]'") from error
    try:
        rows = load_dataset(source.dataset, source.config, split=source.split, revision=source.revision)
        return list(rows[source.column])
    except (DatasetsError, HTTPError, OSError, RuntimeError) as error:
        first = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise HubError(f"data set {source.dataset}: {first}; check name, network and `hf auth login`") from error
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
