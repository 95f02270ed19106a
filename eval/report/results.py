"""The figures of runs as one flat row each, for a spreadsheet, a script or an experiment tracker.

Sizes are bytes, speeds tokens per second, divergences nats. What was not measured is empty.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from .runs import MACHINE, Metrics, ReportedRun, reported_runs
from .words import DASH, markdown_text

Row = dict[str, Any]  # column -> text, number or None
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes a text that begins so for
# Columns of a table for people; files have all.
SHORT = (
    "model", "recipe", "format", "file_bytes", "bits_per_weight", "perplexity", "kl_mean", "top1_agreement",
    "decode_tokens_per_second",
)  # fmt: skip
_GIVEN = {"parameters", "windows", "context", *MACHINE}  # numbers that nobody measured

_PATHS: dict[str, tuple[str, ...]] = {
    "run": ("name",),
    "revision": ("model", "revision"),
    "scheme": ("scheme",),
    "method": ("method",),
    "format": ("format",),
    "parameters": ("model", "parameters"),
    "file_bytes": ("size", "file_bytes"),
    "bits_per_weight": ("size", "bits_per_weight", "decoder"),
    "bits_per_quantized_weight": ("size", "bits_per_weight", "quantized"),
    "bits_per_weight_of_all": ("size", "bits_per_weight", "all"),
    **{
        key: ("quality", key)
        for key in (
            "perplexity", "perplexity_se", "baseline_perplexity", "perplexity_ratio", "perplexity_ratio_se",
            "kl_mean", "kl_mean_se", "kl_median", "kl_p99", "kl_max", "top1_agreement", "top1_agreement_se", "rms_dp",
        )
    },
    "kernel_kl_mean": ("kernels", "rounded_inputs", "kl_mean"),
    "resident_bytes": ("memory", "resident_bytes"),
    "peak_rss_bytes": ("memory", "peak_rss_bytes"),
    "peak_cuda_bytes": ("memory", "peak_cuda_bytes"),
    "protocol": ("protocol", "name"),
    "text": ("protocol", "text"),
    "windows": ("protocol", "windows"),
    "context": ("protocol", "context"),
    "dtype": ("protocol", "dtype"),
    **{key: ("machine", key) for key in MACHINE},
    "quantize_seconds": ("seconds", "quantize"),
    "evaluate_seconds": ("seconds", "evaluate"),
    "bitpress": ("versions", "bitpress"),
    "command": ("command",),
}  # fmt: skip


def rows(runs: Sequence[Metrics]) -> list[Row]:
    """One row for each run, in the report's order; all have the same columns.

    Speeds are those at the smallest batch and prompt; each further load has columns of its own, and so has each task.
    """
    uneven = [_row(run) for run in reported_runs(runs)]
    columns = list(dict.fromkeys(column for row in uneven for column in row))
    return [{column: row.get(column) for column in columns} for row in uneven]


def _row(run: ReportedRun) -> Row:
    row: Row = {"model": run.model, "recipe": run.label}
    row |= {column: run.get(*path) for column, path in _PATHS.items()}
    judged = run.get("gates", "judged") or []
    missed = [str(gate["gate"]) for gate in judged if not gate["passed"]]
    row["gates"] = f"missed: {', '.join(missed)}" if missed else "passed" if judged else None
    loads = sorted(
        (speed for speed in run.get("speed") or [] if "skipped" not in speed),
        key=lambda speed: [speed.get(key) or 0 for key in ("batch", "prompt", "generate")],
    )
    for number, speed in enumerate(loads):
        load = f"_batch_{speed.get('batch')}_prompt_{speed.get('prompt')}" if number else ""
        for phase in ("prefill", "decode"):
            row[f"{phase}_tokens_per_second{load}"] = (speed.get(phase) or {}).get("median")
        first = (speed.get("first_token_seconds") or {}).get("median")
        row[f"first_token_seconds{load}"] = first
    for task in run.get("tasks") or []:
        row[f"{task.get('task')}/{task.get('metric')}"] = task.get("value")
    return row


def as_csv(table: Sequence[Row]) -> str:
    """Comma-separated values with a header, as RFC 4180 has them but for line ends."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([_cell(column) for column in (table[0] if table else {})])
    writer.writerows([_cell(value) for value in row.values()] for row in table)
    return out.getvalue()


def _cell(value: Any) -> Any:
    """A value that no spreadsheet takes for a formula: names come from checkpoints."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def as_json(table: Sequence[Row]) -> str:
    """A list of objects."""
    return json.dumps(list(table), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def short(table: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the columns that people compare."""
    columns = [column for column in SHORT if any(row.get(column) is not None for row in table)]
    return columns, [[_text(row.get(column)) for column in columns] for row in table]


def as_markdown(table: Sequence[Row]) -> str:
    """The columns of `short` as a table of GitHub Markdown."""
    header, cells = short(table)
    lines = [header, ["---" if column in SHORT[:3] else "---:" for column in header]]
    lines += [[markdown_text(cell) for cell in row] for row in cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _text(value: Any) -> str:
    if value is None:
        return DASH
    return f"{value:.5g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def figures(row: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """The measured numbers of a row, and everything else as text, without what is empty."""
    measured = {k: v for k, v in row.items() if k not in _GIVEN and not isinstance(v, bool)}
    numbers = {k: float(v) for k, v in measured.items() if isinstance(v, int | float)}
    return numbers, {k: str(v) for k, v in row.items() if v is not None and k not in numbers}
