"""The pages in a real browser, if one is installed: the policy lets their script run, it sorts, nothing overflows."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bitpress.eval.report import render

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=5000 --dump-dom"
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

LONG = "a-name-without-any-place-to-break-" * 6
ROWS = [
    (["b", LONG, "16,216 (0.90x)", "2.00 GB", "≈ +0.001 (± 1)"], False),
    (["a", "x", "–", "900 MB", "+0.02 (± 1)"], False),
    (["c", "y", "997", "80.5 kB", "+5.1e-05 (± 1)"], False),
    (["a10", "z", "18,025", "–", "–"], True),
]
SORTED = {  # column: ascending rows, then descending
    0: ("a a10 b c", "c b a10 a"),
    2: ("c b a10 a", "a10 b c a"),
    3: ("c a b a10", "b a c a10"),
    4: ("c b a a10", "a b c a10"),
}
PROBE = """<script>
const seen = {width: document.documentElement.scrollWidth, sorted: {}};
const names = () => [...document.querySelectorAll("tbody tr")].map((row) => row.cells[0].textContent).join(" ");
for (const column of [0, 2, 3, 4]) {
  const button = document.querySelectorAll("thead button")[column];
  seen.sorted[column] = [0, 1].map(() => { button.click(); return names(); });
}
parent.document.body.innerHTML = `<pre>FOUND${JSON.stringify(seen)}</pre>`;
</script>"""


@pytest.fixture
def page() -> str:
    """A page built from the shared base and macros, with the widest content that a run may have."""
    environment = render.environment(autoescape=True)
    source = """{% extends "base.html.j2" %}{% import "macros.html.j2" as page %}
    {% block body %}<h1>{{ long }}</h1>{{ page.summary("t", header, rows, 1) }}{% endblock %}"""
    view = {"long": LONG, "header": ["run", "how", "speed", "size", "more"], "rows": ROWS}
    return environment.from_string(source).render({**view, **render.script()})


def browse(path: Path, folder: Path) -> tuple[str, str]:
    command = [str(CHROMIUM), *FLAGS.split(), f"--user-data-dir={folder / 'profile'}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


def test_the_policy_lets_the_pages_own_script_run_and_no_other(page: str, tmp_path: Path):
    path = tmp_path / "page.html"
    path.write_text(page.replace("</body>", "<script>document.title = 'injected'</script></body>"))
    shown, said = browse(path, tmp_path)
    assert shown.count("<button>") == len(ROWS[0][0])
    assert "<title>injected" not in shown
    assert said.count("CONSOLE") == 1  # the injected script's refusal
    assert "Content Security Policy" in said


@pytest.mark.parametrize("width", [360, 1280])
def test_it_sorts_and_does_not_overflow(page: str, tmp_path: Path, width: int):
    open_page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page).replace("</body>", PROBE)
    frame = f'<body><iframe width="{width}" height="800" style="border: 0" srcdoc="{html.escape(open_page)}"></iframe>'
    (tmp_path / "frame.html").write_text(frame)
    shown, said = browse(tmp_path / "frame.html", tmp_path)
    seen = json.loads(html.unescape(re.search(r"FOUND({.*})", shown)[1]))
    assert seen["width"] <= width
    assert {int(column): tuple(names) for column, names in seen["sorted"].items()} == SORTED
    assert "CONSOLE" not in said
