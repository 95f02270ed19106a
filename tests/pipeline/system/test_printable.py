"""What is printed steers no terminal, and loses no letter of any language."""

import io
import json
import logging
import unicodedata
import warnings

import pytest
from rich.table import Table

from bitpress.pipeline.system import printable as module
from bitpress.pipeline.system.printable import Terminal, make_libraries_printable, printable

HOSTILE = "\x1b]0;t\x07\x1b[2J\x9b1m\r\u202eevil\u2066\ud800"
HARMLESS = [
    "می‌خواهم", "👨‍👩‍👧", "10\u202f000\u00a0€", "\u3000你好", "क्‍ष", "e\u0301 שלום\u200f", "🏴\U000e0067\U000e007f",
    "a\tb\n",
]  # fmt: skip


@pytest.mark.parametrize("text", HARMLESS, ids=ascii)
def test_letters_stay(text: str):
    assert printable(text) == text


def test_what_steers_a_terminal_is_seen():
    assert printable(HOSTILE) == r"\u001b]0;t\u0007\u001b[2J\u009b1m\u000d\u202eevil\u2066\ud800"
    printable(HOSTILE).encode()


def test_every_control_character_is_seen():
    """By the categories of Unicode, which the code does not ask: Cc, Cs, and what overrides directions."""
    for number in range(0x110000):
        letter = chr(number)
        steers = unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\t"
        steers |= unicodedata.bidirectional(letter) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
        assert (printable(letter) != letter) == steers, hex(number)


def test_pieces_are_as_the_whole():
    """A sequence that is split between pieces is seen too."""
    assert "".join(map(printable, HOSTILE)) == printable(HOSTILE)


def test_json_stays_the_same_json():
    dumped = json.dumps({HOSTILE: [HOSTILE]}, ensure_ascii=False)
    assert json.loads(printable(dumped)) == {HOSTILE: [HOSTILE]}


@pytest.mark.parametrize("markup", [True, False])
def test_a_console_prints_what_is_printable(markup: bool):
    console = Terminal(file=io.StringIO(), force_terminal=True, width=200)
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(f"{HOSTILE}:cat:")
    console.print(table, HOSTILE, markup=markup, highlight=False)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert not {"\x07", "\x9b", "\r", "\u202e", "\u2066", "\ud800"} & set(text)
    assert "\x1b]" not in text  # its own styles are sequences too
    assert "\x1b[2J" not in text
    assert text.count(r"\u001b[2J") == 4
    assert ":cat:" in text


def test_what_libraries_say(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    factory, logger, stream = logging.getLogRecordFactory(), logging.getLogger("some.library"), io.StringIO()
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    token = "hf_" + "a" * 30
    try:
        make_libraries_printable()
        make_libraries_printable()
        logger.error("the server says %s", HOSTILE + token)
    finally:
        logging.setLogRecordFactory(factory)
        logger.removeHandler(handler)
    assert stream.getvalue() == f"the server says {printable(HOSTILE)}<TOKEN>\n"
    text = warnings.formatwarning(UserWarning(HOSTILE + token), UserWarning, "file.py", 1, "")
    assert printable(HOSTILE) in text
    assert token not in text
    assert warnings.formatwarning is module._format_warning
