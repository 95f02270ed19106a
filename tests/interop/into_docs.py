"""Puts the tables that `make interop` wrote into its page of the documents: `python tests/interop/into_docs.py`."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "interop.md"


def main() -> None:
    """Each <!-- FILE --> to <!-- end of FILE --> gets the file between them."""
    text = PAGE.read_text()
    for file in re.findall("<!-- end of (.*) -->", text):
        begin, end = f"<!-- {file} -->\n", f"<!-- end of {file} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{(ROOT / file).read_text().strip()}\n\n{end}{rest.split(end)[1]}"
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
