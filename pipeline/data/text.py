"""Text to measure or to calibrate on: files, data sets of the Hub, and one that Python itself has."""

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HTTPError

from ..config.schema import Dataset
from ..errors import ConfigError, HubError, NumericsError
from ..system.packages import install

PYDOC_TOPICS = "builtin:pydoc-topics"
_PROSE = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".raw", ".tokens")  # wikitext's end in the last two
_CODE = (".py", ".c", ".h", ".cpp", ".go", ".java", ".js", ".rs", ".ts")  # what models of code read
_LINES = (".jsonl", ".ndjson", ".jsonlines")
_TABLES = {".csv": ",;\t", ".tsv": "\t"}  # what may stand between cells
SUFFIXES = (*_PROSE, *_CODE, *_LINES, ".json", *_TABLES, ".parquet")  # of files that are read, in any case
_KINDS = "a .txt, .md, .json, .jsonl, .csv, .tsv or .parquet file"
_PACKED = (".gz", ".zst", ".bz2", ".xz", ".zip", ".tar", ".tgz", ".7z")
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"BZh9": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "parquet",
    b"%PDF-": "a PDF",
}
CONVERSATIONS = ("messages", "conversations")  # columns that hold them
_LONGEST_BEGINNING = 1 << 20  # characters in which a file's first row is looked for
_LONGEST_CELL = 1 << 30  # characters
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


def needed_packages(source: str | Dataset) -> list[str]:
    """The packages, beside bitpress's own requirements, that it takes to read a source."""
    if isinstance(source, Dataset):
        return ["datasets"]
    return ["pyarrow"] if source.lower().endswith(".parquet") else []


def read_text(source: str | Dataset) -> Text:
    """Text from a file, a data set of the Hub, or Python itself.

    A file is plain text (.txt, .md), or rows with a column "text" (.json, .jsonl, .csv, .tsv, .parquet).

    Raises:
        ConfigError: no such file or kind. HubError: the data set cannot be downloaded. NumericsError: it holds no text.
    """
    return join(read_rows(source, (source.column if isinstance(source, Dataset) else "text",)))


def join(rows: Rows) -> Text:
    """Documents as one text.

    Raises:
        NumericsError: a row that is no text, or nothing but whitespace in all of them.
    """
    if rows.column in CONVERSATIONS:
        raise NumericsError(f"{rows.name} holds conversations ({rows.column}), expected text")
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
        raise ConfigError(f"{path}: no such text file; give {_KINDS}, or {PYDOC_TOPICS}")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES and suffix:
        packed = "; unpack it first" if suffix in _PACKED else ", and rename it if it is one of these"
        raise ConfigError(f"{path}: a {suffix} file is not read; give {_KINDS}{packed}")
    if suffix == ".parquet":
        return _parquet(path, columns)
    content = _decoded(path)
    if suffix in _LINES:
        return _json_lines(path, content, columns)
    if suffix == ".json":
        return _json(path, content, columns)
    if suffix in _TABLES:
        return _table(path, content, _TABLES[suffix], columns)
    if _holds_rows(content):
        raise NumericsError(
            f"{path}: holds rows of JSON, and its name says plain text, so their syntax would count as text; "
            "name it .jsonl (an object a line) or .json (a list)"
        )
    return "text", [content]


def _decoded(path: Path) -> str:
    """The text of a file, its line ends as \\n; a byte order mark is no text.

    Raises:
        NumericsError: it is no UTF-8 text. ConfigError: it cannot be read.
    """
    try:
        content = path.read_bytes()
        if kind := next((kind for magic, kind in _MAGIC.items() if content.startswith(magic)), None):
            raise NumericsError(f"{path}: holds {kind}, expected UTF-8 text; unpack or convert it first")
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NumericsError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if "\0" in text:
        raise NumericsError(f"{path}: no text, it holds bytes of zero (the first is byte {content.index(0)})")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _holds_rows(content: str) -> bool:
    """Whether a plain text is really rows of JSON: lines of objects, or a list of them, with text or conversations."""
    start = content.lstrip()[:_LONGEST_BEGINNING]
    try:
        first = json.loads(content)[0] if re.match(r"\[\s*\{", start) else json.loads(start.partition("\n")[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and any(column in first for column in ("text", *CONVERSATIONS))


def _parquet(path: Path, columns: tuple[str, ...]) -> tuple[str, list[Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"{path}: parquet needs the pyarrow package; {install('pyarrow')}") from error
    try:
        column = _first(columns, pyarrow.parquet.read_schema(path).names)
        return column, pyarrow.parquet.read_table(path, columns=[column])[column].to_pylist()
    except (pyarrow.ArrowException, KeyError, OSError) as error:
        raise NumericsError(f"{path}: not a parquet file with a column {_quoted(columns)}: {error}") from error


def _json_lines(path: Path, content: str, columns: tuple[str, ...]) -> tuple[str, list[Any]]:
    # splitlines() would also split at U+2028, within strings
    lines = ((f"line {number}", line) for number, line in enumerate(content.split("\n"), 1) if line.strip())
    return _values(path, lines, columns)


def _json(path: Path, content: str, columns: tuple[str, ...]) -> tuple[str, list[Any]]:
    """A list of rows, or of texts; an object of columns; or, as many call such files too, an object a line."""
    try:
        whole = json.loads(content)
    except RecursionError as error:
        raise NumericsError(f"{path}: JSON that is nested too deeply is no list of rows") from error
    except ValueError as error:
        if content.lstrip().startswith("["):
            raise NumericsError(f"{path}: not a JSON list of rows: {error}") from error
        return _json_lines(path, content, columns)
    if isinstance(whole, list):
        if whole and all(isinstance(row, str) for row in whole):
            return "text", whole
        return _values(path, ((f"row {number}", row) for number, row in enumerate(whole, 1)), columns)
    column = _first(columns, whole if isinstance(whole, dict) else ())
    value = whole.get(column) if isinstance(whole, dict) else None
    if isinstance(value, list) and (column == "text" or isinstance(next(iter(value), None), list)):
        return column, value
    return _values(path, [("its only row", whole)], columns)


def _values(path: Path, rows: Iterable[tuple[str, Any]], columns: tuple[str, ...]) -> tuple[str, list[Any]]:
    """The first of the columns that the first row has, and its value in each row.

    Args:
        rows: where in the file, and a row; as JSON where it is text.
    Raises:
        NumericsError: a row that is no object, or lacks the column.
    """
    column, values = "", []
    for where, row in rows:
        try:
            row = json.loads(row) if isinstance(row, str) else row
            column = column or _first(columns, row)
            values.append(row[column])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            wanted = _quoted((column,) if values else columns)
            raise NumericsError(f"{path}, {where}: expected a JSON object with a {wanted}: {error}") from error
    return column or columns[0], values


def _table(path: Path, content: str, delimiters: str, columns: tuple[str, ...]) -> tuple[str, list[Any]]:
    """A column of comma- or tab-separated values whose first line names the columns; conversations stand as JSON."""
    first = content.partition("\n")[0]
    limit = csv.field_size_limit(_LONGEST_CELL)  # of the whole process, and by default too small for documents
    try:
        headers = {delimiter: next(csv.reader([first], delimiter=delimiter), []) for delimiter in delimiters}
        delimiter = next((delimiter for delimiter in headers if {*columns} & {*headers[delimiter]}), None)
        if delimiter is None:
            raise NumericsError(f"{path}: the first line names no column {_quoted(columns)}, it is {first!r:.80}")
        header = headers[delimiter]
        column = _first(columns, header)
        values: list[Any] = []
        for number, cells in enumerate(csv.reader(io.StringIO(content), delimiter=delimiter, strict=True)):
            if len(cells) not in (0, len(header)):
                raise NumericsError(
                    f"{path}, row {number}: {len(cells)} cells, the first line names {len(header)}; text that holds a "
                    f"{delimiter!r} or a line end must stand in quotes"
                )
            if number and cells:
                cell = cells[header.index(column)]
                values.append(json.loads(cell) if column in CONVERSATIONS else cell)
    except (csv.Error, ValueError, RecursionError) as error:
        raise NumericsError(f"{path}: not a table with a column {_quoted(columns)}: {error}") from error
    finally:
        csv.field_size_limit(limit)
    return column, values


def _dataset(source: Dataset, columns: tuple[str, ...]) -> tuple[str, list[Any]]:
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ConfigError(f"a Hub data set needs the datasets package; {install('datasets')}") from error
    try:
        rows = load_dataset(source.dataset, source.config, split=source.split, revision=source.revision)
        column = _first(columns, rows.column_names) if len(columns) > 1 else columns[0]
        return column, list(rows[column])
    except (DatasetsError, HTTPError, OSError, RuntimeError) as error:
        first = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise HubError(f"data set {source.dataset}: {first}; check name, network and `hf auth login`") from error
    except (KeyError, ValueError) as error:
        raise ConfigError(f"data set {source.dataset}: {error}") from error
