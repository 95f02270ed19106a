"""Keeps tokens of the Hugging Face Hub out of whatever is printed, logged or published."""

import re

_TOKEN = re.compile(r"\bhf_(?:[a-z]+_)?[A-Za-z0-9]{20,}")
HIDDEN = "<TOKEN>"


def redact(text: str) -> str:
    """The text without the token in use, and without anything else that looks like one."""
    from huggingface_hub import get_token  # which takes its time to import

    live = get_token()
    return _TOKEN.sub(HIDDEN, text.replace(live, HIDDEN) if live else text)


def has_token(content: bytes) -> bool:
    """Whether a file holds a token."""
    text = content.decode("utf-8", errors="replace")
    return redact(text) != text
