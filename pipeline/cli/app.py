"""The command line: parses, prints, and maps errors to exit codes; no logic."""

import gc
import json
import shlex
import signal
import sys
import traceback
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import BitpressError, CheckpointError
from ..system.collector import collector_paused
from ..system.progress import quiet_libraries
from ..system.redact import redact
from . import bench, chat
from .options import Device, Dtype, Json, KernelName, Revision


class Redo(str, Enum):
    """Stages that a run can be told to do again."""

    evaluate = "evaluate"


app = typer.Typer(
    help="Press Transformer checkpoints into fewer bits, and know what that cost.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip
app.add_typer(bench.app, name="bench")
_out = Console()
_err = Console(stderr=True)


def _news(line: str) -> None:
    _err.print(escape(line), highlight=False, soft_wrap=True)


def _typed() -> str:
    """What the user typed, for reports."""
    return shlex.join(["bitpress", *sys.argv[1:]])


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


# What a narrow terminal does without first; the report has it all.
_DISPENSABLE = (
    "peak RSS",
    "resident",
    "method/format",
    "batch 8",
    "top-1",
    "prefill",
    "batch",
    "bits/weight",
    "file size",
)


def _fitting(header: list[str], rows: list[list[str]], width: int) -> list[int]:
    """The columns that fit, the most dispensable given up first."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    columns = list(range(len(header)))
    for words in _DISPENSABLE:
        for column in reversed([c for c in columns if words in header[c]]):
            if sum(widths[c] + 2 for c in columns) <= width:
                return columns
            columns.remove(column)
    return columns


def _table(header: list[str], rows: list[list[str]]) -> None:
    console = _out if _out.is_terminal else Console(width=1000)
    columns = _fitting(header, rows, console.width)
    table = Table(header_style="bold", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(header[column], justify="right" if number and len(header) > 2 else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(row[column]) for column in columns))
    console.print(table)


@app.command()
def run(
    configs: Annotated[
        list[Path] | None, typer.Argument(help="Config files, or names of shipped ones; demo if none.")
    ] = None,
    set: Annotated[list[str] | None, typer.Option("--set", help="Override a key: eval.windows=10")] = None,
    override: Annotated[
        bool, typer.Option("--override", help="Accept what misses a gate; the report records it.")
    ] = False,
    redo: Annotated[
        Redo | None, typer.Option(help="evaluate: measure again what was measured before; artifacts are kept.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Quantize, save, reload, measure and report, for every model and recipe of the configs."""
    from ..config.load import load_config
    from ..quantize.recipe import problems
    from ..runs.run import execute, summarize

    quiet_libraries()
    runs = [load_config(path, set, problems) for path in configs or [Path("demo")]]  # all are checked before any starts
    everything = []
    for config in runs:
        outcomes = execute(config, _typed(), _news, override, redo is Redo.evaluate)
        page = summarize(config, outcomes)
        everything += outcomes
        if not as_json:
            _show(outcomes, page)
    if as_json:
        _print_json([_outcome_json(outcome) for outcome in everything])
    if codes := {outcome.error.exit_code for outcome in everything if outcome.error}:
        raise typer.Exit(codes.pop() if len(codes) == 1 else 1)


def _outcome_json(outcome: Any) -> dict[str, Any]:
    error = {"error": str(outcome.error)} if outcome.error else {}
    return {
        "model": outcome.model,
        "recipe": outcome.recipe,
        "folder": str(outcome.folder),
        **error,
        "published": outcome.published,
        "metrics": outcome.metrics,
    }


def _protocol(settings: dict[str, Any]) -> str:
    return (
        f"perplexity per {settings['unit']} by protocol {settings['name']} on {settings['text']}: "
        f"{settings['windows']} windows of at most {settings['context']} tokens, {settings['tokens']} scored, "
        f"in {settings['dtype']}"
    )


def _show(outcomes: list[Any], page: Path | None) -> None:
    from bitpress.eval.report.report import summary_rows

    finished = [outcome.metrics for outcome in outcomes if outcome.metrics]
    if finished:
        _out.print()
        _table(*summary_rows(finished))
        for protocol in {_protocol(metrics["protocol"]): None for metrics in finished}:
            _out.print(f"\n{escape(protocol)}", highlight=False)
    for outcome in outcomes:
        if outcome.error:
            line = f"{escape(outcome.model)}  {outcome.recipe}: {escape(str(outcome.error))}"
            _out.print(f"\n[red]failed[/red]  {line}", soft_wrap=True)
    if page:
        _out.print(f"\nreport: {escape(str(page))}", soft_wrap=True)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="A Hub id or a local folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.")],
    recipe: Annotated[
        str, typer.Option(help="[method/]scheme: int4-g128, gptq/int3-channel, int8-dynamic, nf4, …")
    ] = "int4-g128",
    layer: Annotated[
        list[str] | None,
        typer.Option(help="'*.down_proj=int8-g128' or 'model.layers.0.*=none' (kept); may be repeated, the last wins."),
    ] = None,
    format: Annotated[
        str, typer.Option(help="auto: the first that holds every layer; or one of `bitpress list`.")
    ] = "auto",
    option: Annotated[
        list[str] | None, typer.Option(help="key=value, an option of the method; may be repeated.")
    ] = None,
    fit_groups: Annotated[
        bool, typer.Option("--fit-groups", help="Layers that the group size does not divide get a smaller one.")
    ] = False,
    allow_split_fused: Annotated[
        bool, typer.Option("--allow-split-fused", help="Parts of what servers fuse, such as q, k and v, may differ.")
    ] = False,
    calibration: Annotated[
        str | None,
        typer.Option(help="The text for calibrated methods: a file, or org/name:config:split; wikitext-2 by default."),
    ] = None,
    windows: Annotated[int | None, typer.Option(help="How many windows of it; 128 by default.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens per window; 2048 by default.")] = None,
    seed: Annotated[
        str | None, typer.Option(help="Draws the windows; 0 by default, null for the text's first ones.")
    ] = None,
    max_fallback_layers: Annotated[
        int, typer.Option(min=0, help="Layers that may fall back to rounding to nearest.")
    ] = 0,
    device: Device = "auto",
    revision: Revision = None,
) -> None:
    """Quantize one checkpoint into a folder that other runtimes load too."""
    from ..api import quantize as quantize_api
    from ..config.load import load_layers, load_options
    from ..system.progress import progress

    quiet_libraries()
    method, slash, scheme = recipe.rpartition("/")
    settings: dict[str, Any] = {"scheme": scheme, "method": method if slash else "auto", "format": format}
    settings |= {"layers": load_layers(layer or []), "options": load_options(option or [])}
    settings |= {"fit_groups": fit_groups, "allow_split_fused": allow_split_fused}
    settings |= {"max_fallback_layers": max_fallback_layers}
    text = {"text": calibration, "windows": windows, "context": context}
    text = {key: value for key, value in text.items() if value is not None}
    text |= load_options([f"seed={seed}"] if seed else [])
    settings |= {"calibration": text} if text else {}
    with progress(f"quantizing to {recipe}") as step:
        notes = quantize_api(model, settings, output, revision, device, step)
    for note in notes:
        _news(note)
    _out.print(f"{escape(str(output))}: {recipe}; try `bitpress eval {escape(str(output))}`", soft_wrap=True)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A folder, quantized or not, or a Hub id.")],
    baseline: Annotated[str | None, typer.Option(help="What it was made from: to compare it with.")] = None,
    text: Annotated[str, typer.Option(help="A .txt, .jsonl or .parquet file.")] = "builtin:pydoc-topics",
    protocol: Annotated[str, typer.Option(help="gptq, sliding, llama.cpp or word.")] = "gptq",
    context: Annotated[int | None, typer.Option(help="Tokens per window; the protocol's own by default.")] = None,
    stride: Annotated[int, typer.Option(help="Between windows, of the protocol sliding.")] = 512,
    windows: Annotated[int | None, typer.Option(help="How many windows; all by default.")] = None,
    tasks: Annotated[list[str] | None, typer.Option("--task", help="Of lm-eval; may be repeated.")] = None,
    dtype: Dtype = "auto",
    kernel: KernelName = "auto",
    device: Device = "auto",
    revision: Revision = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A folder for metrics.json and report.html, to be compared.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Perplexity, memory and speed of one checkpoint, and how far it is from its baseline."""
    from bitpress.eval.report.words import facts_of

    from ..api import evaluate as evaluate_api
    from ..config.load import load_eval
    from ..data.text import read_text
    from ..evaluate.conditions import Conditions
    from ..evaluate.external import evaluate_external
    from ..hub.download import resolve

    quiet_libraries()
    settings: dict[str, Any] = {"text": text, "protocol": protocol, "context": context, "stride": stride}
    settings |= {"windows": windows, "tasks": tasks or [], "dtype": dtype, "kernel": kernel}
    if output:
        original = resolve(baseline) if baseline else None
        chosen = load_eval(settings)
        conditions = Conditions.make(chosen, device, read_text(chosen.text), _typed())
        metrics = evaluate_external(resolve(model, revision), original, conditions, output.expanduser(), _news)
    else:
        metrics = evaluate_api(model, revision, device, settings, baseline)
    if as_json:
        _print_json(metrics)
        return
    described = {"text": Path(text).name, "dtype": metrics.get("dtype"), **metrics["protocol"]}
    _table([model, ""], [["", _protocol(described)], *facts_of(metrics)])
    if output:
        _out.print(f"\nreport: {escape(str(output / 'report.html'))}", soft_wrap=True)


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Runs, folders of runs, and any checkpoints, which are measured as the runs were."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for compare.html, .md and .json.")],
    budget: Annotated[
        list[str] | None, typer.Option(help="Memory for the model, such as 6GB; may be repeated; cards by default.")
    ] = None,
    context: Annotated[int, typer.Option(min=0, help="Tokens of cache that memory is counted with.")] = 4096,
) -> None:
    """Runs and checkpoints on one page: a table, the Pareto fronts, which differ, and which to choose."""
    from ..evaluate.compare import compare as compare_runs

    quiet_libraries()
    page, choices = compare_runs(runs, output.expanduser(), budget or [], context, _typed(), _news)
    _table(["memory", "choose"], choices)
    _out.print(f"\ncomparison: {escape(str(page))}", soft_wrap=True)


app.add_typer(chat.app)


@app.command()
def inspect(folder: Annotated[Path, typer.Argument(help="A checkpoint folder.")], as_json: Json = False) -> None:
    """What a checkpoint is, from its headers alone."""
    with collector_paused():
        from ..checkpoints.describe import describe

    description = describe(folder)
    if as_json:
        _print_json(description)
        return
    rows = [[key, str(value)] for key, value in description.items() if not isinstance(value, list)]
    rows += [[key, str(item)] for key, value in description.items() if isinstance(value, list) for item in value]
    _table([str(folder), ""], rows)


@app.command()
def doctor(folder: Annotated[Path, typer.Argument(help="A checkpoint folder.")], as_json: Json = False) -> None:
    """Whether a checkpoint is sound, and which runtimes load it; exit code 3 where it is not."""
    from ..system.progress import progress

    with collector_paused():
        from ..checkpoints.doctor import diagnose

        quiet_libraries()
    with progress("reading every tensor") as step:
        diagnosis = diagnose(folder, step)
    if as_json:
        _print_json(diagnosis.to_dict())
    else:
        _show_diagnosis(diagnosis)
    if not diagnosis.sound:
        raise typer.Exit(CheckpointError.exit_code)


def _show_diagnosis(diagnosis: Any) -> None:
    what = [[key, str(value)] for key, value in diagnosis.what.items() if not isinstance(value, list)]
    _table([diagnosis.folder, ""], what)
    _out.print("\n[green]sound[/green]" if diagnosis.sound else "\n[red]unsound[/red]")
    for line in [*diagnosis.faults, *(f"note: {note}" for note in diagnosis.notes)]:
        _out.print(escape(f"    {line}"), highlight=False, soft_wrap=True)
    for name, verdict in diagnosis.runtimes.items():
        needs = f" (needs {verdict['needs']})" if verdict["needs"] else ""
        _reasons(f"{name}: {verdict['loads']}{needs}", verdict["why"])
    for count, split in diagnosis.tensor_parallel.items():
        gpus = f"{count} GPU{'s' if count != '1' else ''}"
        _reasons(f"{gpus}, every layer on vLLM's and SGLang's fast kernel: {split['loads']}", split["why"])


def _reasons(line: str, reasons: list[str]) -> None:
    _out.print(escape(line), highlight=False, soft_wrap=True)
    for reason in reasons[:3]:
        _out.print(escape(f"    {reason}"), highlight=False, soft_wrap=True)
    if len(reasons) > 3:
        _out.print(f"    … and {len(reasons) - 3} more: see --json", highlight=False)


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="A quantized folder, or a Hub id.")],
    to: Annotated[str, typer.Option(help="compressed-tensors, gptq or gptq-v2.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.")],
) -> None:
    """A quantized checkpoint in another format, its weights the same to the bit, or a refusal that says why."""
    from ..api import convert as convert_api
    from ..system.progress import progress

    quiet_libraries()
    with progress(f"converting to {to}") as step:
        notes = convert_api(model, to, output, step)
    for note in notes:
        _news(note)
    _out.print(f"{escape(str(output))}: {to}; try `bitpress doctor {escape(str(output))}`", soft_wrap=True)


@app.command()
def publish(
    run: Annotated[Path, typer.Argument(help="The folder of one finished scheme: runs/NAME/SCHEME.")],
    repo: Annotated[str, typer.Option(help="owner/name on the Hub; made where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository a private one.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go up, and write the card.")] = False,
    override: Annotated[bool, typer.Option("--override", help="Although it misses a gate; the card says so.")] = False,
) -> None:
    """Put a finished run on the Hugging Face Hub, with a model card; again, to go on where it broke off."""
    from bitpress.eval.report.words import size

    from ..api import publish as publish_api
    from ..system.progress import progress

    quiet_libraries()
    with progress("checking") as step:
        publication = publish_api(run, repo, private, dry_run, override, step)
    _table(["file", "size"], [[name, size(nbytes)] for name, nbytes in publication.files.items()])
    for name, why in publication.left_out.items():
        _news(f"stays here: {name}, {why}")
    for sentence in publication.missed:
        _news(f"gate missed (overridden): {sentence}")
    where = f"{publication.repo}; its card is {publication.card}"
    if publication.url:
        where = f"{publication.url} at {publication.revision}"
    _out.print(escape(f"\n{publication.state}: {where}"), highlight=False, soft_wrap=True)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """Methods, formats, and kernels with the reason where one cannot run here."""
    from ..checkpoints.describe import catalogue

    quiet_libraries()
    everything = catalogue()
    if as_json:
        _print_json(everything)
        return
    for kind, rows in everything.items():
        _table([kind, ""], [[name, text] for name, text in rows.items()])
        _out.print()


_INTERRUPTED = 130


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """The entry point: errors become a sentence and an exit code; --debug shows the traceback."""
    signal.signal(signal.SIGTERM, _interrupt)
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except BitpressError as error:
        if debug:
            sys.stderr.write(redact(traceback.format_exc()))
        _err.print(f"[red]error:[/red] {escape(redact(str(error)))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, SystemExit) as stop:  # typer turns the one into the other
        if isinstance(stop, SystemExit) and stop.code != _INTERRUPTED:
            raise
        _err.print("interrupted; run the same command again to go on")
        sys.exit(_INTERRUPTED)
    finally:
        gc.freeze()  # the process ends: to look through all that was imported once more takes tenths of a second
