"""Progress with the time left, on a terminal and in a notebook; silence elsewhere."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .printable import Terminal, make_libraries_printable, printable

OnStep = Callable[[int, int], None]
Listener = Callable[[str, int, int], None]
_listeners: list[Listener] = []  # the last one is told of all progress in this process
_PATIENCE = 2.0  # seconds: what is over sooner needs no bar


def quiet_libraries(weights: bool = True) -> None:
    """For processes of our own: the libraries' bars and hints would drown what bitpress has to say.

    Args:
        weights: whether some are downloaded or loaded, which would show bars. If not, the libraries, which take a
            second to import, are not imported here.
    """
    if weights:
        from huggingface_hub.utils import disable_progress_bars
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        if not sys.stderr.isatty():  # on a terminal, downloads show how long they take
            disable_progress_bars()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # when it is imported, it sets the level by this
    for name in ("transformers", "bitsandbytes", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    make_libraries_printable()  # huggingface_hub tells of waits, in the server's words


@contextlib.contextmanager
def reported(listener: Listener) -> Iterator[None]:
    """As long as this lasts, progress is told to a function of (label, done, total), and no bar is drawn."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextlib.contextmanager
def job_table() -> Iterator[Callable[[list[list[str]]], None]]:
    """A function that shows rows (job, node, what it does, how far, since when) as one table, always the latest, on
    stderr; silence where that is no terminal."""
    if not sys.stderr.isatty():
        yield lambda rows: None
        return
    with Live(console=Terminal(stderr=True), auto_refresh=False, transient=True) as live:

        def show(rows: list[list[str]]) -> None:
            table = Table(box=None, pad_edge=False)
            for title in ("job", "node", "what it does", "how far", "since"):
                table.add_column(title, overflow="ellipsis", no_wrap=True)
            for row in rows:
                table.add_row(*(escape(printable(cell)) for cell in row))
            live.update(table, refresh=True)

        yield show


@contextlib.contextmanager
def progress(label: str) -> Iterator[OnStep]:
    """A function of (done, total) that draws a bar on stderr once the work has taken two seconds."""
    if _listeners:
        yield partial(_listeners[-1], label)
        return
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
        if shown:
            bar.stop()


def shown(on_step: OnStep | None, label: str) -> contextlib.AbstractContextManager[OnStep]:
    """The caller's own function of (done, total), or a bar where there is none."""
    return contextlib.nullcontext(on_step) if on_step else progress(label)


def _in_notebook() -> bool:
    """Whether a kernel of Jupyter runs this program, and can draw: rich does it by ipywidgets, and warns without."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell" and find_spec("ipywidgets") is not None
