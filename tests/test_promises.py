"""What SECURITY.md and docs/faults.md promise: every promise names a test that exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("SECURITY.md", "docs/faults.md")
FAULTS = 44
REFERENCE = re.compile(r"`(tests/[\w/]+\.py)((?:::\w+)*)`")


def defined(path: Path) -> set[str]:
    """Names of the functions and classes of a file."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kinds)}


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_is_named_exists(page: str):
    references = REFERENCE.findall((ROOT / page).read_text(encoding="utf-8"))
    assert references
    for file, names in references:
        assert (ROOT / file).is_file(), file
        missing = set(names.split("::")[1:]) - defined(ROOT / file)
        assert not missing, f"{file}: {missing}"


@pytest.mark.parametrize("page", PAGES)
def test_every_row_that_promises_names_a_test(page: str):
    """Rows of the tables whose last column is Tests."""
    promises = 0
    for table in re.split(r"\n\n", (ROOT / page).read_text(encoding="utf-8")):
        rows = table.strip().splitlines()
        if rows and rows[0].endswith("| Tests |"):
            for row in rows[2:]:
                assert REFERENCE.search(row), row
                promises += 1
    assert promises


def test_every_fault_has_its_row():
    numbers = re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "faults.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert list(map(int, numbers)) == list(range(1, FAULTS + 1))
