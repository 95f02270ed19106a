"""What the tests of pages share: text that tries to be more than text, and what a browser would make of a page."""

from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest


class Page(HTMLParser):
    """Of the tags: their names, attributes and ids."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    @property
    def ids(self) -> list[str | None]:
        return [value for name, value in self.attributes if name == "id"]


@pytest.fixture(scope="session")
def parse() -> Callable[[str], Page]:
    """parse(page): what a browser would see of its tags."""
    return Page


@pytest.fixture(scope="session")
def evil() -> str:
    return "<script>alert(1)</script>|`x`\"'\n# boom\n\x1b[31m\u202e$x_{2}$"


@pytest.fixture(scope="session")
def spoil(evil: str) -> Callable[[Any], Any]:
    """spoil(run): the same with hostile text wherever it has text."""

    def spoiled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: spoiled(item) for key, item in value.items()}
        if isinstance(value, list):
            return [spoiled(item) for item in value]
        return value + evil if isinstance(value, str) else value

    return spoiled
