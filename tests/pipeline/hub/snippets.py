"""Runs a card's code as its readers do, in a process that knows the stand-in by its environment alone.

stdin: a JSON list of {"language", "code"}. Last line of stdout: a JSON list of {"said", "error"}, one for each.
"""

import contextlib
import io
import json
import shlex
import sys
import traceback


def python(code: str) -> None:
    exec(compile(code, "<card>", "exec"), {"__name__": "__main__"})


def command(code: str) -> None:
    from bitpress.pipeline.cli import main

    for line in code.splitlines():
        sys.argv = shlex.split(line)
        sys.stdin = io.StringIO("hello\n")  # of bitpress chat
        try:
            main()
        except SystemExit as stop:
            if stop.code:
                raise


def run(language: str, code: str) -> dict[str, str | None]:
    said, error = io.StringIO(), None
    with contextlib.redirect_stdout(said):
        try:
            (python if language == "python" else command)(code)
        except BaseException:
            error = traceback.format_exc()
    return {"said": said.getvalue(), "error": error}


if __name__ == "__main__":
    print(json.dumps([run(**snippet) for snippet in json.load(sys.stdin)]))
