"""`bitpress bench`: speed and quality, side by side. This file parses and prints; pipeline/bench/ does the work."""

import math
import re
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from ..errors import ConfigError
from ..system.printable import Terminal
from .console import command_line, news, print_json, print_line, write
from .options import DEFAULT_RECIPE, Device, Json, KernelName

if TYPE_CHECKING:  # torch takes seconds to import, and the command line is to answer at once
    import torch

    from bitpress.kernels.bench.measure import Cell, Job, Result

app = typer.Typer(help="Speed and quality, side by side with others.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Speed and quality, side by side with others."""


@app.command("quantize")
def quantize(
    model: Annotated[str, typer.Argument(help="A Hub id or a local folder.")],
    calibration: Annotated[str, typer.Option(help="Text to calibrate on: a file, or org/name:config:split.")],
    scheme: Annotated[str, typer.Option(help="The other programs': int4-g128, int3-channel-asym, …")] = "int4-g128",
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            help="bitpress's: in a word, or as '{scheme: int3-g128, distill: 50}', for gptq/SCHEME; repeatable."
        ),
    ] = None,
    windows: Annotated[int, typer.Option(help="How many windows of the text.")] = 128,
    context: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    seed: Annotated[int | None, typer.Option(help="Draws the windows; the text's first ones by default.")] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help="NAME=PYTHON, where autoround, gptqmodel or llm-compressor is; repeatable.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each, in turns; medians are shown.")] = 1,
    text: Annotated[str | None, typer.Option(help="Text to measure KL and perplexity on.")] = None,
    text_windows: Annotated[int | None, typer.Option(help="How many windows of it; all by default.")] = None,
    as_json: Json = False,
) -> None:
    """Time bitpress's quantization against other installed programs: same model, tokens and group size."""
    from ..bench.programs import bitpress, find
    from ..bench.race import make_job, race, rows
    from ..system.device import pick_device
    from ..system.machine import machine
    from ..system.progress import quiet_libraries

    quiet_libraries()
    recipes = recipe or [f"gptq/{scheme}"]
    programs = [*map(bitpress, recipes), *find(peer or [])]
    judge = {"text": text, "context": context, "windows": text_windows} if text else None
    job = make_job(
        model, scheme, {"text": calibration, "windows": windows, "context": context, "seed": seed}, judge, seed or 0
    )
    with tempfile.TemporaryDirectory(prefix="bitpress-bench-") as folder:
        results = race(programs, job, repeats, Path(folder), news)
    where = machine(pick_device("auto"))
    if as_json:
        about = {"scheme": scheme, "recipes": recipes, "calibration": job.calibration.to_dict(), "machine": where}
        print_json({**about, "results": [result.to_dict() for result in results]})
        return
    _show(*rows(results))
    print_line(f"\n{job.calibration}; {where['cores']} cores of {where['cpu']}, {where['threads']} threads")


@app.command("quality")
def quality(
    model: Annotated[str, typer.Argument(help="A Hub id or a local folder.")],
    calibration: Annotated[str | None, typer.Option(help="Text to calibrate on; wikitext-2 by default.")] = None,
    text: Annotated[str, typer.Option(help="Text to measure KL on.")] = "builtin:pydoc-topics",
    recipe: Annotated[
        list[str] | None,
        typer.Option(help="In a word, or as '{scheme: int3-g128, distill: 50}', for the usual ones; repeatable."),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PYTHON, where gptqmodel, llm-compressor, autoround or llama.cpp is; may be repeated."),
    ] = None,
    peer_scheme: Annotated[
        list[str] | None, typer.Option(help="int4-g128, …, in place of the usual ones; may be repeated.")
    ] = None,
    kquant: Annotated[
        list[str] | None, typer.Option(help="llama.cpp's Q4_K_M, …, in place of the usual ones; may be repeated.")
    ] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Of calibration; 128, or 32 with --quick.")] = None,
    text_windows: Annotated[int | None, typer.Option(min=1, help="To measure on; 160, or 8 with --quick.")] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    seed: Annotated[int | None, typer.Option(help="Draws the windows; the text's first ones by default.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rows, fewer windows.")] = False,
    minutes: Annotated[float | None, typer.Option(help="Begin no row that would end later.")] = None,
    device: Device = "auto",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A folder; runs/bench/quality-MODEL by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """KL against bits per weight: our recipes and other installed programs, on the same tokens."""
    from bitpress.eval.report.quality_page import table

    from ..bench import kquants, programs
    from ..bench import quality as bench
    from ..system.progress import quiet_libraries

    quiet_libraries()
    tokens: dict[str, Any] = {"windows": windows or (32 if quick else 128), "context": context, "seed": seed}
    tokens |= {"text": calibration} if calibration else {}
    judge = {"text": text, "context": context, "windows": text_windows or (8 if quick else 160)}
    entrants: list[bench.Entrant] = [
        bench.OwnRecipe(name) for name in recipe or (bench.QUICK_RECIPES if quick else bench.RECIPES)
    ]
    for entrant in entrants:
        entrant.fingerprint()  # an unknown recipe is refused before anything runs
    usual = bench.QUICK_SCHEMES if quick else bench.PEER_SCHEMES
    llamacpp = [text for text in peer or [] if text.partition("=")[0] == kquants.NAME]
    others = [text for text in peer or [] if text not in llamacpp]
    entrants += bench.peer_schemes(programs.find(others), peer_scheme or usual)
    entrants += kquants.entrants(llamacpp, kquant or list(kquants.QUICK_TYPES if quick else kquants.TYPES))
    job = bench.Comparison.make(model, tokens, judge, device, output and output.expanduser(), command_line())
    rows = bench.compare(job, entrants, minutes and 60 * minutes, news)
    if as_json:
        write((job.folder / "quality.json").read_text())
        return
    _show(*table(rows))
    print_line(f"\n{job.calibration}; table, plot and figures: {job.folder / 'quality.html'}")


# Llama's: 8B's and 1B's layers on a CPU; on a GPU, 8B's and 70B's.
_SHAPES = {
    "cpu": ["4096x4096", "2048x8192"],
    "cuda": ["4096x4096", "14336x4096", "4096x14336", "8192x8192", "28672x8192", "8192x28672"],
}
_STEADY = 1.5  # p90 / p10: on an idle machine it is below 1.2, as a rule
_QUICK_SHAPES, _QUICK_ROWS = {"cpu": ["4096x4096"], "cuda": ["4096x4096"]}, "1,32"
_ROWS = {"cpu": "1,8,32,512", "cuda": "1,2,4,8,16,32,64,128,512,2048,4096"}


@app.command("kernels")
def kernels(
    device: Device = "auto",
    scheme: Annotated[list[str] | None, typer.Option(help="int4-g128, int8-dynamic, nf4, …; may be repeated.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="OUTxIN, such as 4096x4096; may be repeated.")] = None,
    rows: Annotated[str | None, typer.Option(help="How many rows to multiply by, such as 1,8,32,512.")] = None,
    kernel: Annotated[
        list[str] | None, typer.Option(help="One of `bitpress list`; may be repeated; by default all but reference.")
    ] = None,
    peers: Annotated[bool, typer.Option("--peers", help="Also torch's dynamic INT8, and llama.cpp.")] = False,
    peer: Annotated[
        list[str] | None, typer.Option(help="llama.cpp=PYTHON, where llama-cpp-python is; stands for --peers too.")
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Samples of each, in turns; 20, --quick: 5.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One shape, 1 and 32 rows, few samples.")] = False,
    minutes: Annotated[float | None, typer.Option(min=0, help="Begin nothing that would end later.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU; torch's default if none.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file; in runs/bench by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print that JSON instead of tables.")] = False,
) -> None:
    """Time kernels against torch's bfloat16 layer, the memory and other programs, all in one run.

    What is measured is shown at once and written to the JSON file; Ctrl-C keeps it.
    """
    import torch

    from bitpress.kernels.bench.entrants import entrants
    from bitpress.kernels.bench.measure import cpu_flags, measure

    from ..bench.llamacpp import find_kernels
    from ..storage import files
    from ..system.device import pick_device
    from ..system.machine import machine
    from ..system.progress import quiet_libraries
    from ..system.versions import versions

    quiet_libraries()
    where = pick_device(device)
    if threads:
        torch.set_num_threads(threads)
    shapes = shape or (_QUICK_SHAPES if quick else _SHAPES)[where.type]
    counts = rows or (_QUICK_ROWS if quick else _ROWS[where.type])
    job = _job(where, scheme or ["int4-g128", "int8-dynamic", "nf4"], shapes, counts, repeats or (5 if quick else 20))
    try:
        everyone = entrants(kernel, operators=peers or bool(peer))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if peers or peer:
        everyone.append(find_kernels(peer or []))
    path = output or Path("runs", "bench", f"kernels-{where.type}-{time.strftime('%Y%m%d-%H%M%S')}.json")
    files.make_folder(path.parent)
    about = {"machine": {**machine(where), "flags": cpu_flags()}, "versions": versions()}
    cells: list[Cell] = []
    start, total = time.monotonic(), len(job.schemes) * len(job.shapes) * len(job.rows)
    try:
        for cell in measure(everyone, job, news):
            cells.append(cell)
            files.write_json(path, {**about, "cells": [each.to_dict() for each in cells]})
            spent = time.monotonic() - start
            each_takes, left = spent / len(cells), total - len(cells)
            if not as_json:
                _show_cell(cell, first=len(cells) % len(job.rows) == 1 or len(job.rows) == 1)
            if left and minutes is not None and spent + each_takes > 60 * minutes:
                news(f"no time left for {left} of {total} (--minutes)")
                break
            if left:
                news(f"{len(cells)} of {total}; about {max(1, round(left * each_takes / 60))} min left")
    finally:  # Ctrl-C too: what there is counts
        if cells:
            if as_json:
                write(path.read_text() + "\n")
            else:
                for line in _notes(cells):
                    print_line(line)
            where_from = f"{about['machine']['cpu']}, {torch.get_num_threads()} threads"
            (news if as_json else print_line)(f"{where_from}; every sample is in {path}")


@app.command("decode")
def decode(
    model: Annotated[str, typer.Argument(help="A Hub id or a local folder, quantized or not.")],
    recipe: Annotated[
        list[str] | None, typer.Option(help="What an unquantized model is quantized to, int4-g128; may be repeated.")
    ] = None,
    peer: Annotated[
        str | None, typer.Option(help="llama.cpp=PYTHON, where llama-cpp-python is; it gets the same integers as GGUF.")
    ] = None,
    batch: Annotated[str, typer.Option(help="How many sequences at once.")] = "1,8",
    prompt: Annotated[int | None, typer.Option(min=1, help="Tokens of each prompt; 512, or 128 with --quick.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="To generate after it; 64, or 16 with --quick.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="All take turns so often; 3, or 1 with --quick.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer tokens, one round.")] = False,
    kernel: KernelName = "auto",
    device: Device = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU; torch's default if none.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file; in runs/bench by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print that JSON instead of tables.")] = False,
) -> None:
    """Tokens per second of your own model: against transformers in bfloat16, and llama.cpp.

    What is measured is told at once and written to the JSON file; Ctrl-C keeps it.
    """
    import torch

    from ..bench import decode as bench
    from ..bench.llamacpp import find
    from ..storage import files
    from ..system.device import pick_device
    from ..system.machine import machine
    from ..system.progress import quiet_libraries
    from ..system.versions import versions

    quiet_libraries()
    if threads:
        torch.set_num_threads(threads)
    sizes = _numbers("--batch", batch, "1,8")
    job = bench.Job(
        sizes, prompt or (128 if quick else 512), tokens or (16 if quick else 64), rounds or (1 if quick else 3)
    )
    program = find([peer], "llamacpp_decode_job.py") if peer else None
    where = machine(pick_device(device))
    path = output or Path("runs", "bench", f"decode-{time.strftime('%Y%m%d-%H%M%S')}.json")
    files.make_folder(path.parent)
    complete: list[bench.Row] = []
    current: list[bench.Row] = []
    with tempfile.TemporaryDirectory(prefix="bitpress-bench-") as folder:
        recipes = recipe or [DEFAULT_RECIPE]
        with bench.contenders(model, recipes, kernel, device, program, job, Path(folder), news) as everyone:
            about = {"model": model, "machine": where, "versions": versions(), **asdict(job)}
            about["about"] = {each.name: each.about for each in everyone}
            try:
                for current, finished in bench.measure(everyone, job, news):
                    rows = [row.to_dict() for row in complete + current]
                    files.write_json(path, {**about, "rows": rows})
                    if finished:
                        complete, rows_of_batch, current = complete + current, current, []
                        if not as_json:
                            _show(*bench.table(rows_of_batch))
            finally:  # Ctrl-C too: what there is counts
                if current and not as_json:
                    _show(*bench.table(current))
                if path.exists():
                    text = f"{where['cpu']}, {torch.get_num_threads()} threads; every round is in {path}"
                    (news if as_json else print_line)(text)
                    if as_json:
                        write(path.read_text() + "\n")


def _numbers(option: str, text: str, example: str) -> tuple[int, ...]:
    """The numbers, above 0, of an option's text.

    Raises:
        ConfigError: it is something else.
    """
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise ConfigError(f"{option} {text}: expected numbers with commas between, such as {example}")
    return tuple(map(int, text.split(",")))


def _job(device: "torch.device", schemes: list[str], shapes: list[str], rows: str, repeats: int) -> "Job":
    """The job from what was typed.

    Raises:
        ConfigError: a scheme, shape or number of rows that does not exist.
    """
    from bitpress.kernels.bench.measure import Job
    from bitpress.kernels.scheme import Scheme

    try:
        parsed = tuple(Scheme.parse(name) for name in schemes)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    sizes = []
    for text in shapes:
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        if not match:
            raise ConfigError(f"--shape {text}: expected OUTxIN, output by input features, such as 4096x4096")
        sizes.append((int(match[1]), int(match[2])))
        for scheme in parsed:
            if problems := scheme.problems(sizes[-1]):
                raise ConfigError(f"--shape {text} with {scheme.name}: {problems[0]}")
    return Job(device, parsed, tuple(sizes), _numbers("--rows", rows, "1,8,32,512"), repeats)


def _show_cell(cell: "Cell", first: bool) -> None:
    """Print what was measured for one number of rows. first: of its scheme and shape; it gets title and header."""
    from bitpress.kernels.bench.entrants import own_kernels

    own = own_kernels()
    others = [result.name for result in cell.results if result.name not in own]
    title = f"{cell.scheme}, {cell.shape[0]} x {cell.shape[1]}" if first else None
    style: dict[str, Any] = {"box": box.SIMPLE_HEAD if first else box.SIMPLE, "padding": (0, 1, 0, 0)}
    table = Table(title=title, title_justify="left", show_header=first, header_style="bold", **style)
    names = [result.name for result in cell.results]
    table.add_column("rows", justify="right", min_width=4)
    table.add_column("kernel", no_wrap=True, min_width=max(map(len, ["memory", *names])))
    for name, width in (("ms", 8), ("p10–p90", 15), ("GB/s", 6), ("of memory", 9), ("GOPS", 6), ("error", 6)):
        table.add_column(name, justify="right", no_wrap=True, min_width=width)
    for name in others:
        table.add_column(f"x {escape(name)}", justify="right", overflow="fold", min_width=9)
    table.add_row(f"{cell.rows}", "memory", *_spread(cell.memory), f"{cell.memory.bytes_per_second / 1e9:.1f}")
    for result in sorted(cell.results, key=lambda result: result.seconds() if result.samples else math.inf):
        name_style = "bold" if result.name in own else ""
        table.add_row("", escape(result.name), *_figures(cell, result, others), style=name_style)
    console = Terminal() if sys.stdout.isatty() else Terminal(width=120)
    console.print(table)


def _spread(result: "Result") -> tuple[str, str]:
    median, low, high = (f"{result.seconds(quantile) * 1e3:.3f}" for quantile in (0.5, 0.1, 0.9))
    return median, f"{low}–{high}"


def _figures(cell: "Cell", result: "Result", others: list[str]) -> list[str]:
    error = f"{result.error:.2%}" if result.error is not None else "–"
    if not result.samples:
        return ["wrong" if (result.problem or "").startswith("wrong") else "failed", "", "", "", "", error]
    ratios = [cell.ratio(result, name) for name in others]
    return [
        *_spread(result),
        f"{result.bytes_per_second / 1e9:.1f}",
        f"{cell.share(result):.0%}",
        f"{cell.gops(result):.0f}",
        error,
        *(f"{ratio:.2f}" if ratio else "–" for ratio in ratios),
    ]


def _notes(cells: "list[Cell]") -> list[str]:
    """Sentences, each once: why a kernel took no part, which numbers were wrong, whether caches were missed."""
    took_part = {result.name for cell in cells for result in cell.results}
    notes: dict[str, None] = {}
    for cell in cells:
        where = f"{cell.scheme}, {cell.shape[0]} x {cell.shape[1]}"
        notes |= {f"{name}: {why}": None for name, why in cell.absent.items() if name not in took_part}
        for result in cell.results:
            if result.problem:
                notes[f"{result.name}, {where}, {cell.rows} rows: {result.problem}"] = None
            described = ", ".join(f"{key}: {value}" for key, value in result.about.items())
            notes |= {f"{result.name}, {cell.scheme}; {described}": None} if described else {}
        memory = cell.memory.about
        cache = f"{memory['cache_bytes'] / 1e6:.0f} MB" if memory["cache_bytes"] else "size unknown"
        notes[f"memory: {cell.memory.nbytes / 1e6:.0f} MB, by {memory['by']}; last-level cache: {cache}"] = None
        if not memory["exceeds_cache"]:
            notes["what is read each round does not exceed that cache: weights may come from it"] = None
    timed = [result for cell in cells for result in (cell.memory, *cell.results) if result.samples]
    unsteady = [result for result in timed if result.seconds(0.9) > _STEADY * result.seconds(0.1)]
    if unsteady:
        count = f"{len(unsteady)} of {len(timed)} medians are unsteady"
        notes[f"{count}: p90 is more than {_STEADY} times p10. Is something else running?"] = None
    return list(notes)


def _show(header: list[str], body: list[list[str]]) -> None:
    console = Terminal() if sys.stdout.isatty() else Terminal(width=1000)
    table = Table(box=box.MARKDOWN, header_style="bold")
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for cells in body:
        table.add_row(*map(escape, cells))
    console.print(table)
