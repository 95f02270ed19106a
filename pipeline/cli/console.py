"""How commands print: tables that fit the terminal and JSON on standard output, news on standard error.

No other module prints: what is printed here is made printable first, whoever wrote it.
"""

import json
import os
import shlex
import sys
import traceback
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..system.printable import Terminal, printable
from ..system.redact import redact

out = Terminal()
err = Terminal(stderr=True)
debug = False  # whether tracebacks are shown

# What a narrow terminal does without first; the report has it all.
_DISPENSABLE = (
    "peak RSS",
    "resident",
    "method/format",
    "batch 8",
    "top-1",
    "prefill",
    "batch",
    "bits/weight",
    "file size",
)


def print_line(line: str) -> None:
    """Print a line of a result as it is."""
    out.print(line, markup=False, highlight=False, soft_wrap=True)


def write(words: str) -> None:
    """Print words as a model generates them."""
    print(printable(words), end="", flush=True)


def news(line: str) -> None:
    """Print a line on what happens, on standard error."""
    err.print(line, markup=False, highlight=False, soft_wrap=True)


def show_traceback(error: BaseException) -> None:
    """With --debug, print where an error comes from, on standard error."""
    if debug:
        news(redact("".join(traceback.format_exception(error))))


def command_line() -> str:
    """What the user typed, and in which folder, for reports: relative paths mean nothing without it."""
    typed = shlex.join(["bitpress", *sys.argv[1:]])
    try:
        return f"cd {shlex.quote(os.getcwd())} && {typed}"
    except FileNotFoundError:  # it was deleted
        return typed


def print_json(value: Any) -> None:
    """Print a value for a script to read."""
    print(printable(json.dumps(value, indent=2, ensure_ascii=False)))


def fitting_columns(header: list[str], rows: list[list[str]], width: int) -> list[int]:
    """The columns that fit, the most dispensable given up first."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    columns = list(range(len(header)))
    for words in _DISPENSABLE:
        for column in reversed([c for c in columns if words in header[c]]):
            if sum(widths[c] + 2 for c in columns) <= width:
                return columns
            columns.remove(column)
    return columns


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print a table, on a narrow terminal without its least important columns."""
    console = out if out.is_terminal else Terminal(width=1000)
    columns = fitting_columns(header, rows, console.width)
    table = Table(header_style="bold", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(header[column], justify="right" if number and len(header) > 2 else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(row[column]) for column in columns))
    console.print(table)


def protocol_sentence(settings: dict[str, Any]) -> str:
    """How a perplexity was measured: its protocol, its text, and how much of it."""
    begin = f"; {settings['bos']} begins with the tokenizer's BOS" if settings.get("bos") else ""
    return (
        f"perplexity per {settings['unit']} by protocol {settings['name']} on {settings['text']}: "
        f"{settings['windows']} windows of at most {settings['context']} tokens, {settings['tokens']} scored, "
        f"in {settings['dtype']}{begin}"
    )
