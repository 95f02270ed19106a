"""The fresh process: `python -m bitpress.pipeline.evaluate REQUEST.json`, with nothing but files to go by."""

import json
import sys
from pathlib import Path

from ..errors import BitpressError
from ..storage import files
from ..system.progress import quiet_libraries
from .measure import measure_task
from .verify import verify_task

TASKS = {"verify": verify_task, "measure": measure_task}


def main() -> None:
    """Do the task of the request and write its answer, or its error, to the file that the request names."""
    quiet_libraries()
    request = json.loads(Path(sys.argv[1]).read_text())
    try:
        answer = TASKS[request["task"]](request)
    except BitpressError as error:
        answer = {"error": str(error), "kind": type(error).__name__}
    except KeyboardInterrupt:  # a terminal sends it to both processes: the other one says so
        sys.exit(130)
    files.write_json(Path(request["answer"]), answer)


if __name__ == "__main__":
    main()
