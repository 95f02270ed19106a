"""Text to measure or to calibrate on: files, data sets of the Hub, and one that Python itself has."""

import hashlib
import json
import os
import re
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HTTPError

from ..config.schema import Dataset
from ..errors import ConfigError, HubError, NumericsError

PYDOC_TOPICS = "builtin:pydoc-topics"
_JOIN = "\n\n"  # GPTQ's protocol joins documents by a blank line
_SURROGATE = re.compile("[\ud800-\udfff]")  # which JSON's \\u escapes can bring, and UTF-8 cannot hold


@dataclass(frozen=True)
class Text:
    """name: what the report calls it; content: its documents, joined by a blank line; sha256: of its UTF-8 bytes."""

    name: str
    content: str
    documents: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


@dataclass(frozen=True)
class Rows:
    """One column of a source: documents, or conversations. name: of the source, as reports call it."""

    name: str
    column: str
    values: list[Any]


def read_text(source: str | Dataset) -> Text:
    """Text from a file (.txt, .md, .jsonl or .parquet with a "text" column), a Hub data set, or Python itself.

    Raises:
        ConfigError: no such file or kind. HubError: the data set cannot be downloaded. NumericsError: it holds no text.
    """
    return join(read_rows(source, (source.column if isinstance(source, Dataset) else "text",)))


def join(rows: Rows) -> Text:
    """Documents as one text.

    Raises:
        NumericsError: a row that is no text, or nothing but whitespace in all of them.
    """
    for number, document in enumerate(rows.values, 1):
        if not isinstance(document, str):
            raise NumericsError(f"{rows.name}: row {number} holds {document!r:.40}, expected text")
    content = _JOIN.join(rows.values)
    if not content.strip():
        raise NumericsError(f"{rows.name} holds no text; give a file with some")
    check_unicode(rows.name, content)
    return Text(rows.name, content, tuple(rows.values))


def check_unicode(name: str, content: str) -> None:
    """Refuse half a surrogate pair, which no tokenizer takes.

    Raises:
        NumericsError: names it.
    """
    if match := _SURROGATE.search(content):
        raise NumericsError(f"{name}: half a surrogate pair (U+{ord(match[0]):04X}) is no text; mend it first")


def read_rows(source: str | Dataset, columns: tuple[str, ...]) -> Rows:
    """The rows of a source: its values in the first of `columns` that it has. A text file is one row of "text".

    Raises:
        As read_text.
    """
    if isinstance(source, Dataset):
        name = "/".join(filter(None, (source.dataset, source.config, source.split)))
        return Rows(name, *_dataset(source, columns))
    if source == PYDOC_TOPICS:
        from pydoc_data.topics import topics

        return Rows(source, "text", [topics[key] for key in sorted(topics)])
    return Rows(Path(source).name, *_file(Path(os.path.expanduser(source)), columns))


def _first(columns: tuple[str, ...], present: Container[str]) -> str:
    return next((column for column in columns if column in present), columns[0])


def _quoted(columns: tuple[str, ...]) -> str:
    return " or ".join(f'"{column}"' for column in columns)


def _file(path: Path, columns: tuple[str, ...]) -> tuple[str, list[Any]]:
    if not os.path.isfile(path):
        raise ConfigError(f"{path}: no such text file; give a .txt, .jsonl or .parquet file, or {PYDOC_TOPICS}")
    if path.suffix == ".parquet":
        return _parquet(path, columns)
    try:
        content = path.read_text(encoding="utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        raise NumericsError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    return _json_lines(path, content, columns) if path.suffix == ".jsonl" else ("text", [content])


def _parquet(path: Path, columns: tuple[str, ...]) -> tuple[str, list[Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"{path}: parquet needs the pyarrow package; pip install 'bitpress[hub]'") from error
    try:
        column = _first(columns, pyarrow.parquet.read_schema(path).names)
        return column, pyarrow.parquet.read_table(path, columns=[column])[column].to_pylist()
    except (pyarrow.ArrowException, KeyError, OSError) as error:
        raise NumericsError(f"{path}: not a parquet file with a column {_quoted(columns)}: {error}") from error


def _json_lines(path: Path, content: str, columns: tuple[str, ...]) -> tuple[str, list[Any]]:
    column, values = "", []
    for number, line in enumerate(content.split("\n"), 1):  # splitlines() would also split at U+2028, within strings
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            column = column or _first(columns, row)
            values.append(row[column])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            wanted = _quoted((column,) if values else columns)
            raise NumericsError(f"{path}, line {number}: expected a JSON object with a {wanted}: {error}") from error
    return column or columns[0], values


def _dataset(source: Dataset, columns: tuple[str, ...]) -> tuple[str, list[Any]]:
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ConfigError("a Hub data set needs the datasets package; pip install 'bitpress[hub]'") from error
    try:
        rows = load_dataset(source.dataset, source.config, split=source.split, revision=source.revision)
        column = _first(columns, rows.column_names) if len(columns) > 1 else columns[0]
        return column, list(rows[column])
    except (DatasetsError, HTTPError, OSError, RuntimeError) as error:
        first = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise HubError(f"data set {source.dataset}: {first}; check name, network and `hf auth login`") from error
    except (KeyError, ValueError) as error:
        raise ConfigError(f"data set {source.dataset}: {error}") from error
