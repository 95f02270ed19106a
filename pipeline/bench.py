"""`bitpress bench`: speed, side by side. Parses and prints; the work is in peers/."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer(help="Speed, side by side with others.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Speed, side by side with others."""


@app.command("quantize")
def quantize(
    model: Annotated[str, typer.Argument(help="A Hub id or a local folder.")],
    calibration: Annotated[str, typer.Option(help="Text to calibrate on: a file, or org/name:config:split.")],
    scheme: Annotated[str, typer.Option(help="int4-g128, int3-channel-asym, …")] = "int4-g128",
    method: Annotated[str, typer.Option(help="bitpress's; the peers run GPTQ.")] = "gptq",
    windows: Annotated[int, typer.Option(help="How many windows of the text.")] = 128,
    context: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    seed: Annotated[int | None, typer.Option(help="Draws the windows; the text's first ones by default.")] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help="NAME=PYTHON, where gptqmodel or llm-compressor is; may be repeated.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each, in turns; medians are shown.")] = 1,
    text: Annotated[str | None, typer.Option(help="Text to measure KL and perplexity on.")] = None,
    text_windows: Annotated[int | None, typer.Option(help="How many windows of it; all by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a script to read.")] = False,
) -> None:
    """Time bitpress's quantization against that of the peers that are installed: same model, tokens and group size."""
    from .loading import pick_device
    from .machine import machine
    from .peers import bitpress, find
    from .peers.race import make_job, race, rows
    from .progress import quiet_libraries

    quiet_libraries()
    programs = [bitpress(method), *find(peer or [])]
    judge = {"text": text, "context": context, "windows": text_windows} if text else None
    job = make_job(
        model, scheme, {"text": calibration, "windows": windows, "context": context, "seed": seed}, judge, seed or 0
    )
    with tempfile.TemporaryDirectory(prefix="bitpress-bench-") as folder:
        results = race(programs, job, repeats, Path(folder), lambda line: print(line, file=sys.stderr, flush=True))
    where = machine(pick_device("auto"))
    if as_json:
        about = {"scheme": scheme, "method": method, "calibration": job.calibration.to_dict(), "machine": where}
        print(json.dumps({**about, "results": [result.to_dict() for result in results]}, indent=2, ensure_ascii=False))
        return
    _show(*rows(results))
    print(f"\n{job.calibration}; {where['cores']} cores of {where['cpu']}, {where['threads']} threads")


def _show(header: list[str], body: list[list[str]]) -> None:
    console = Console() if sys.stdout.isatty() else Console(width=1000)
    table = Table(box=box.MARKDOWN, header_style="bold")
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for cells in body:
        table.add_row(*map(escape, cells))
    console.print(table)
