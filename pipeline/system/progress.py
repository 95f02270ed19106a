"""Progress with the time left, on a terminal and in a notebook; silence elsewhere."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .printable import Terminal, make_libraries_printable, printable

OnStep = Callable[[int, int], None]
_PATIENCE = 2.0  # seconds: what is over sooner needs no bar


def quiet_libraries() -> None:
    """For processes of our own: the libraries' bars and hints would drown what bitpress has to say."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if not sys.stderr.isatty():  # on a terminal, downloads show how long they take
        disable_progress_bars()
    for name in ("transformers", "bitsandbytes", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    make_libraries_printable()  # huggingface_hub tells of waits, in the server's words


@contextlib.contextmanager
def progress(label: str) -> Iterator[OnStep]:
    """A function of (done, total) that draws a bar on stderr once the work has taken two seconds."""
    if not sys.stderr.isatty() and not _in_notebook():
        yield lambda done, total: None
        return
    start = time.monotonic()
    bar = Progress(
        TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), console=Terminal(stderr=True), transient=True,
    )  # fmt: skip
    task = bar.add_task(escape(printable(label)), total=None)
    shown = False

    def step(done: int, total: int) -> None:
        nonlocal shown
        if not shown and time.monotonic() - start > _PATIENCE:
            bar.start()
            shown = True
        bar.update(task, completed=done, total=total)

    try:
        yield step
    finally:
        bar.stop()


def shown(on_step: OnStep | None, label: str) -> contextlib.AbstractContextManager[OnStep]:
    """The caller's own function of (done, total), or a bar where there is none."""
    return contextlib.nullcontext(on_step) if on_step else progress(label)


def _in_notebook() -> bool:
    """Whether a kernel of Jupyter runs this program."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"
