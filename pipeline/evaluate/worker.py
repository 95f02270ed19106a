"""One task in a fresh process: `python -m bitpress.pipeline.evaluate REQUEST.json`, which has nothing but files.

Used so that what is measured is what a user loads, and that its peak memory is its own.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from .. import errors
from ..errors import BitpressError
from ..storage import files


def call(task: str, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a task in a fresh process and return its answer; its progress goes to this process's stderr.

    Raises:
        BitpressError: the one that the task raised, or that the process died.
    """
    paths = {name: folder / f".{task}.{name}.json" for name in ("request", "answer")}
    paths["answer"].unlink(missing_ok=True)
    files.write_json(paths["request"], {"task": task, "answer": str(paths["answer"].resolve()), **request})
    command = [sys.executable, "-m", "bitpress.pipeline.evaluate", str(paths["request"].resolve())]
    code = subprocess.run(command, check=False).returncode
    if not paths["answer"].exists():
        cause = "it was killed, perhaps for want of memory" if code < 0 else f"exit code {code}"
        raise BitpressError(f"the {task} process ended without an answer: {cause}")
    answer = json.loads(paths["answer"].read_text())
    for path in paths.values():
        path.unlink()
    if "error" in answer:
        raise getattr(errors, answer["kind"], BitpressError)(answer["error"])
    return answer
