"""The command line: which commands there are, and the exit code of each error. Commands parse and print; no logic."""

import gc
import signal
import sys
import traceback
from typing import Any

import typer
from rich.markup import escape

from ..errors import BitpressError
from ..system.redact import redact
from . import bench, chat, evaluate, inspect, run
from .console import err, news

app = typer.Typer(
    help="Press Transformer checkpoints into fewer bits, and know what that cost.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip
app.command()(run.run)
app.command()(run.quantize)
app.command("eval")(evaluate.evaluate)
app.command()(evaluate.compare)
app.command()(inspect.inspect)
app.command()(inspect.doctor)
app.command()(run.convert)
app.command()(run.publish)
app.command("list")(inspect.list_)
app.add_typer(bench.app, name="bench")
app.add_typer(chat.app)

_INTERRUPTED = 130


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """The entry point: errors become a sentence and an exit code; --debug shows the traceback."""
    signal.signal(signal.SIGTERM, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal that knows no Chinese shows the characters' numbers
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except BitpressError as error:
        if debug:
            news(redact(traceback.format_exc()))
        err.print(f"[red]error:[/red] {escape(redact(str(error)))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, SystemExit) as stop:  # typer turns the one into the other
        if isinstance(stop, SystemExit) and stop.code != _INTERRUPTED:
            raise
        err.print("interrupted; run the same command again to go on")
        sys.exit(_INTERRUPTED)
    finally:
        gc.freeze()  # the process ends: to look through all that was imported once more takes tenths of a second
