"""The command line: which commands there are, and the exit code of each error. Commands parse and print; no logic."""

import gc
import io
import sys
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..system import children, interrupts, program
from ..system.redact import redact
from ..system.unexpected import unexpected
from ..system.versions import versions
from . import bench, chat, console, evaluate, inspect, plan, run

_USAGE = 2  # exit code of a command line that cannot be read

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


def _show_version(wanted: bool) -> None:
    if wanted:
        known = versions()
        others = ", ".join(f"{name} {known.get(name, 'missing')}" for name in ("torch", "transformers", "python"))
        console.print_line(f"bitpress {known.get('bitpress', 'not installed')} ({others})")
        raise typer.Exit


@app.callback()
def bitpress(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="With an error, show where it comes from.")] = False,
) -> None:
    """Press Transformer checkpoints into fewer bits, and know what that cost."""


app.command()(run.run)
app.command()(run.quantize)
app.command()(plan.plan)
app.command()(plan.recommend)
app.command()(run.clean)
app.command("eval")(evaluate.evaluate)
app.command()(evaluate.compare)
app.command()(evaluate.results)
app.command()(inspect.inspect)
app.command()(inspect.doctor)
app.command()(run.convert)
app.command()(run.optimize)
app.command()(run.imatrix)
app.command()(run.publish)
app.command("list")(inspect.list_)
app.add_typer(bench.app, name="bench")
app.add_typer(chat.app)


def _tell(sentence: str) -> None:
    console.err.print(f"[red]error:[/red] {escape(redact(sentence))}", highlight=False, soft_wrap=True)


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
        code = app(prog_name="bitpress", standalone_mode=False)
        if code == interrupts.INTERRUPTED:  # typer makes an exit of Ctrl-C
            raise KeyboardInterrupt
        sys.exit(code or 0)
    except BaseException as error:
        leaving = error if isinstance(error, SystemExit) else None
        # a library that Ctrl-C hits while it is imported makes another error of it
        if interrupted or isinstance(error, KeyboardInterrupt) or (leaving and leaving.code == interrupts.INTERRUPTED):
            interrupts.end()
        if leaving:
            raise
        if describe := getattr(error, "format_message", None):  # typer's: the command line cannot be read
            console.show_traceback(error)
            if message := describe():  # none where it has shown the help, as for a command without a word after it
                command = context.command_path if (context := getattr(error, "ctx", None)) else "bitpress"
                _tell(f"{message.rstrip('.')}; see `{command} --help`")
            sys.exit(_USAGE)
        known = unexpected(error)
        console.show_traceback(known)
        _tell(str(known))
        sys.exit(known.exit_code)
    finally:
        interrupts.handle(interrupts.end_now)
        gc.freeze()  # the process ends: to look through all that was imported once more takes tenths of a second
