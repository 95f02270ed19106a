"""Makes text printable: names and messages of checkpoints and servers may hold what steers a terminal.

Everything that bitpress prints goes through here: the commands by way of pipeline/cli/console.py, progress by way of
`Terminal`, libraries by way of `make_libraries_printable`.
"""

import logging
import re
import warnings
from typing import Any

from rich.console import Console
from rich.text import Text

from .redact import redact

# Control characters of ASCII and Latin-1 but tab and newline (escape sequences begin with two of them), characters that
# reverse the direction of the text around them, and halves of characters, which no encoding can write. The joiners,
# combining marks and narrow spaces of other languages and of emoji are letters like all others.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, visible: bool = True) -> str:
    r"""The text with visible escapes, such as \u001b, in place of what steers a terminal or cannot be written.

    Each character stands for itself, so text may be handed over in pieces. JSON stays the same JSON.

    Args:
        visible: False leaves such characters out.
    """
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}" if visible else "", text)


class Terminal(Console):
    """A console of rich whose strings are made printable before they are laid out, cells of tables included."""

    def __init__(self, **options: Any):
        super().__init__(emoji=False, **options)  # no name of a file or a tensor stands for a picture

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


class _Record(logging.LogRecord):
    """A message of a library, without tokens and made printable."""

    def getMessage(self) -> str:
        return printable(redact(super().getMessage()))


def _format_warning(*details: Any, **more: Any) -> str:
    return printable(redact(_formatted(*details, **more)))


_formatted = warnings.formatwarning


def make_libraries_printable() -> None:
    """Make what libraries log and warn of printable and free of tokens, in a process of our own."""
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = _format_warning
