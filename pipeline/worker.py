"""One task in a fresh process: `python -m bitpress.pipeline.worker REQUEST.json`, with nothing but files to go by.

Used so that what is measured is what a user loads, and that its peak memory is its own.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import errors, store
from .errors import BitpressError


def call(task: str, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a task in a fresh process and return its answer; its progress goes to this process's stderr.

    Raises:
        BitpressError: the one that the task raised, or that the process died.
    """
    paths = {name: folder / f".{task}.{name}.json" for name in ("request", "answer")}
    paths["answer"].unlink(missing_ok=True)
    store.write_json(paths["request"], {"task": task, "answer": str(paths["answer"].resolve()), **request})
    command = [sys.executable, "-m", "bitpress.pipeline.worker", str(paths["request"].resolve())]
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


def main() -> None:
    from .progress import quiet_libraries
    from .stages import evaluate, measure

    quiet_libraries()
    request = json.loads(Path(sys.argv[1]).read_text())

    tasks = {"check": evaluate.check_task, "measure": measure.measure_task}
    try:
        answer = tasks[request["task"]](request)
    except BitpressError as error:
        answer = {"error": str(error), "kind": type(error).__name__}
    except KeyboardInterrupt:  # a terminal sends it to both processes: the other one says so
        sys.exit(130)
    store.write_json(Path(request["answer"]), answer)


if __name__ == "__main__":
    main()
