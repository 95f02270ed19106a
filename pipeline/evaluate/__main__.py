"""The fresh process: `python -m bitpress.pipeline.evaluate REQUEST.json`, with nothing but files to go by."""

import json
import sys
from pathlib import Path

from ..errors import BitpressError
from ..storage import files


def main() -> None:
    from ..system.progress import quiet_libraries
    from . import measure, verify

    quiet_libraries()
    request = json.loads(Path(sys.argv[1]).read_text())

    tasks = {"verify": verify.verify_task, "measure": measure.measure_task}
    try:
        answer = tasks[request["task"]](request)
    except BitpressError as error:
        answer = {"error": str(error), "kind": type(error).__name__}
    except KeyboardInterrupt:  # a terminal sends it to both processes: the other one says so
        sys.exit(130)
    files.write_json(Path(request["answer"]), answer)


if __name__ == "__main__":
    main()
