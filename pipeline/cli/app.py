"""The command line: which commands there are, and the exit code of each error. Commands parse and print; no logic."""

import gc
import io
import sys
from typing import Any

import typer
from rich.markup import escape

from ..system import children, interrupts, program
from ..system.redact import redact
from ..system.unexpected import unexpected
from . import bench, chat, console, evaluate, inspect, run

app = typer.Typer(
    help="Press Transformer checkpoints into fewer bits, and know what that cost.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip
app.command()(run.run)
app.command()(run.quantize)
app.command()(run.plan)
app.command()(run.clean)
app.command("eval")(evaluate.evaluate)
app.command()(evaluate.compare)
app.command()(inspect.inspect)
app.command()(inspect.doctor)
app.command()(run.convert)
app.command()(run.publish)
app.command("list")(inspect.list_)
app.add_typer(bench.app, name="bench")
app.add_typer(chat.app)


def main() -> None:
    """The entry point: errors become a sentence and an exit code; --debug shows the traceback.

    Ctrl-C lets what is open be closed; a second one ends the process at once.
    """
    interrupted = False

    def interrupt(number: int, frame: Any) -> None:
        nonlocal interrupted
        if interrupted:
            children.kill_all()
            interrupts.end_now(number, frame)
        interrupted = True
        raise KeyboardInterrupt

    def unraisable(details: Any) -> None:
        """What Python cannot raise where it happens, as in the end of an object's life, and would print."""
        if isinstance(details.exc_value, KeyboardInterrupt):
            interrupt(0, None)  # the second time: the first one was lost there
        console.show_traceback(unexpected(details.exc_value))  # into the log

    program.leave_current_folder()
    interrupts.handle(interrupt)
    sys.unraisablehook = unraisable
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows no Chinese shows characters' numbers
    console.debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except BaseException as error:
        leaving = error if isinstance(error, SystemExit) else None
        # typer makes an exit of Ctrl-C, and a library that it hits while it is imported another error
        if interrupted or isinstance(error, KeyboardInterrupt) or (leaving and leaving.code == interrupts.INTERRUPTED):
            interrupts.end()
        if leaving:
            raise
        known = unexpected(error)
        console.show_traceback(known)
        console.err.print(f"[red]error:[/red] {escape(redact(str(known)))}", highlight=False, soft_wrap=True)
        sys.exit(known.exit_code)
    finally:
        interrupts.handle(interrupts.end_now)
        gc.freeze()  # the process ends: to look through all that was imported once more takes tenths of a second
