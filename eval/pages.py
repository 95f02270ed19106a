"""Templates -> pages. HTML is escaped by Jinja, Markdown by `wording.markdown_text`; both see every expression."""

import base64
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from . import wording as say

_TEMPLATES = Path(__file__).parent / "templates"


def html(name: str, view: Mapping[str, Any]) -> str:
    """One page that needs no other file and no network; its policy allows its own script, by hash, and no other."""
    script = (_TEMPLATES / "sort.js.j2").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shared = {"script": Markup(script), "script_hash": f"sha256-{digest}"}
    return _render(f"{name}.html.j2", {**view, **shared}, autoescape=True, finalize=None)


def markdown(name: str, view: Mapping[str, Any]) -> str:
    """GitHub Markdown."""
    # Jinja's own escaping is for HTML; `finalize` sees every expression, so that nothing is forgotten here.
    return _render(f"{name}.md.j2", view, autoescape=False, finalize=say.markdown_text)


def _render(name: str, view: Mapping[str, Any], autoescape: bool, finalize: Callable[[Any], Any] | None) -> str:
    loader = FileSystemLoader(_TEMPLATES)
    environment = Environment(loader=loader, autoescape=autoescape, finalize=finalize, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters["fenced"] = say.fenced
    return environment.get_template(name).render(view) + "\n"
