"""The commands that measure: eval and compare."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from ..system.progress import quiet_libraries
from .console import command_line, news, print_json, print_line, print_table, protocol_sentence, write
from .options import Device, Dtype, Json, KernelName, Revision


def evaluate(
    model: Annotated[str, typer.Argument(help="A folder, quantized or not, or a Hub id.")],
    baseline: Annotated[str | None, typer.Option(help="What it was made from: to compare it with.")] = None,
    text: Annotated[str, typer.Option(help="A .txt, .json, .jsonl, .csv or .parquet file.")] = "builtin:pydoc-topics",
    protocol: Annotated[str, typer.Option(help="gptq, sliding, llama.cpp or word.")] = "gptq",
    context: Annotated[int | None, typer.Option(help="Tokens per window; the protocol's own by default.")] = None,
    stride: Annotated[int, typer.Option(help="Between windows, of the protocol sliding.")] = 512,
    windows: Annotated[int | None, typer.Option(help="How many windows; all by default.")] = None,
    bos: Annotated[
        str, typer.Option(help="auto, first or every: which windows of gptq and sliding begin with it.")
    ] = "auto",
    tasks: Annotated[list[str] | None, typer.Option("--task", help="Of lm-eval; may be repeated.")] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each task; all by default.")] = None,
    fewshot: Annotated[
        int | None, typer.Option(help="Solved examples before each document; the task's own number by default.")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Put documents as a user's turn, by the chat template.")
    ] = False,
    dtype: Dtype = "auto",
    kernel: KernelName = "auto",
    device: Device = "auto",
    revision: Revision = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A folder for metrics.json and report.html, to be compared.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A first look: few windows, little speed.")] = False,
    redo: Annotated[bool, typer.Option("--redo", help="With -o: measure again what was measured before.")] = False,
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
    settings |= {"windows": windows, "bos": bos, "tasks": tasks or [], "dtype": dtype, "kernel": kernel}
    settings |= {"task_limit": limit, "task_fewshot": fewshot, "task_chat": chat_template}
    chosen = load_eval(settings)
    chosen = chosen.quick() if quick else chosen
    if output:
        original = resolve(baseline) if baseline else None
        conditions = Conditions.make(chosen, device, read_text(chosen.text), command_line(), redo)
        metrics = evaluate_external(resolve(model, revision), original, conditions, output.expanduser(), news)
    else:
        metrics = evaluate_api(model, revision, device, chosen.model_dump(), baseline)
    if as_json:
        print_json(metrics)
        return
    described = {"text": Path(text).name, "dtype": metrics.get("dtype"), **metrics["protocol"]}
    print_table([model, ""], [["", protocol_sentence(described)], *facts_of(metrics)])
    if output:
        print_line(f"\nreport: {output / 'report.html'}")


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
    comparison = compare_runs(runs, output.expanduser(), budget or [], context, command_line(), news)
    for model, header, rows in comparison.tables:
        print_line(model)
        print_table(header, rows)
        print_line("")
    print_table(["memory", "choose"], comparison.choices)
    print_line(f"\ncomparison: {comparison.page}")


def results(
    runs: Annotated[list[Path], typer.Argument(help="Runs, folders of runs, or metrics.json files.")],
    as_csv: Annotated[bool, typer.Option("--csv", help="Every figure, as comma-separated values.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Every figure, as a list of objects.")] = False,
    as_markdown: Annotated[bool, typer.Option("--md", help="A table of Markdown.")] = False,
) -> None:
    """The figures of finished runs, one row each."""
    from bitpress.eval.report import results as tables

    from ..evaluate.compare import metrics_below
    from ..evaluate.metrics import read_metrics

    if as_csv + as_json + as_markdown > 1:
        raise ConfigError("--csv, --json and --md: give one of them")
    paths = dict.fromkeys(file.resolve() for run in runs for file in metrics_below(run.expanduser()))
    rows = tables.rows([read_metrics(file) for file in paths])
    if as_csv or as_json or as_markdown:
        write((tables.as_csv if as_csv else tables.as_json if as_json else tables.as_markdown)(rows))
    else:
        print_table(*tables.short(rows))
