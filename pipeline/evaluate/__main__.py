"""The fresh process: `python -m bitpress.pipeline.evaluate REQUEST.json`, with nothing but files to go by."""

import json
import sys
import traceback
from pathlib import Path
from typing import Any

from ..errors import BitpressError
from ..system import children


def perform(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request, or the error that it ended with: as text, for a process that shares nothing with us."""
    from ..system.redact import redact

    try:
        from ..system.progress import quiet_libraries
        from .measure import measure_task
        from .verify import verify_task

        quiet_libraries()
        return {"verify": verify_task, "measure": measure_task}[request["task"]](request)
    except BaseException as error:  # the last boundary: whatever it is, the caller tells the user
        kind = type(error).__name__ if isinstance(error, BitpressError) else None
        return {"error": str(error), "kind": kind, "traceback": redact("".join(traceback.format_exception(error)))}


def main() -> None:
    """Do the task of the request, and write its answer beside the request."""
    path = Path(sys.argv[1])
    children.end_with_parent(path.parent)
    from ..system.printable import printable

    try:
        from ..storage import files
        from .worker import ANSWER

        files.write_json(path.parent / ANSWER, perform(json.loads(path.read_text())))
    except BaseException as error:  # not even torch can be imported, or there is no room for an answer
        sys.exit(printable(f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    main()
