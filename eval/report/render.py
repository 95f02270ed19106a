"""Templates -> pages. Jinja escapes HTML, and `words.markdown_text` escapes Markdown; both see every expression."""

import base64
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from . import words as say

_TEMPLATES = Path(__file__).parents[1] / "templates"


def html(name: str, view: Mapping[str, Any]) -> str:
    """One page that needs no other file and no network."""
    return environment(autoescape=True).get_template(f"{name}.html.j2").render({**view, **script()}) + "\n"


def markdown(name: str, view: Mapping[str, Any]) -> str:
    """GitHub Markdown."""
    # Jinja's own escaping is for HTML; `finalize` sees every expression, so that nothing is forgotten here.
    templates = environment(autoescape=False, finalize=say.markdown_text)
    return templates.get_template(f"{name}.md.j2").render(view) + "\n"


def script() -> dict[str, str]:
    """The script of every page, and its hash: the page's policy allows the script with this hash and no other."""
    text = (_TEMPLATES / "sort.js.j2").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return {"script": Markup(text), "script_hash": f"sha256-{digest}"}


def environment(autoescape: bool, finalize: Callable[[Any], Any] | None = None) -> Environment:
    """The templates' environment. autoescape: for HTML. finalize: sees every expression before it is written."""
    loader = FileSystemLoader(_TEMPLATES)
    templates = Environment(loader=loader, autoescape=autoescape, finalize=finalize, undefined=StrictUndefined)
    templates.trim_blocks = templates.lstrip_blocks = True
    templates.filters["fenced"] = say.fenced
    return templates
