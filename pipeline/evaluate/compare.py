"""Finished runs and external checkpoints -> compare.html, compare.md and compare.json."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitpress.eval.report import comparison_page, results
from bitpress.eval.report.comparison import CONTEXT, Incomparable, Section
from bitpress.eval.report.comparison import compare as compare_runs
from bitpress.eval.report.recommend import Budget

from ..errors import ConfigError
from ..storage import files
from ..storage.artifacts import is_checkpoint
from .external import measure_like
from .metrics import METRICS, read_metrics
from .process import Say
from .results import RESULTS

MEASURED = "measured"  # of the output: checkpoints that no run made
_DEEP = 4  # folders: output, name, model, recipe
_UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Comparison:
    """The page, and what of it a terminal shows.

    Attributes:
        tables: (model, header, rows) of each model's runs.
        choices: rows of an amount of memory, and which run to choose for it and why.
    """

    page: Path
    tables: list[tuple[str, list[str], list[list[str]]]]
    choices: list[list[str]]


def compare(
    paths: Sequence[Path],
    output: Path,
    budgets: Sequence[str] = (),
    context: int = CONTEXT,
    command: str = "",
    say: Say = lambda line: None,
) -> Comparison:
    """Write the comparison of these runs; checkpoints among them are measured first, as the runs were, whatever figures
    they bring.

    Args:
        budgets: amounts of memory such as "6GB". context: tokens of cache that memory is counted with.
        command: what the user typed, for the reports. say: takes a line of news.
    Raises:
        ConfigError: no runs, runs that do not compare, or a budget that is no amount of memory.
        CheckpointError: a metrics.json or a checkpoint that cannot be used.
    """
    room = [Budget(budget, _bytes(budget)) for budget in budgets]
    paths = [path.expanduser() for path in paths]
    checkpoints = [path for path in paths if is_checkpoint(path)]
    for path in checkpoints:
        if (path / METRICS).exists():
            say(f"{path} holds weights, so it is measured: the {METRICS} that it brings counts for nothing")
    runs = [file for path in paths if path not in checkpoints for file in metrics_below(path)]
    if checkpoints:
        if not runs:
            raise ConfigError(
                f"{checkpoints[0]} is no run, and there is none beside it by whose settings to measure it; give one, "
                f"or measure it by `bitpress eval {checkpoints[0]} --baseline MODEL -o DIR`, and compare DIR"
            )
        measured = [read_metrics(file) for file in _once(runs)]
        _compared(measured, (), 0)  # before anything is measured that would stand beside what does not compare
        runs += measure_like(measured, checkpoints, output / MEASURED, command, say)
    metrics = [read_metrics(file) for file in _once(runs)]
    sections = _compared(metrics, room, context)
    files.make_folder(output)
    files.write_json(output / "compare.json", comparison_page.plain(sections))
    files.write_text(output / "compare.md", comparison_page.markdown(sections))
    files.write_text(output / "compare.html", comparison_page.html(sections))
    files.write_text(output / RESULTS, results.as_csv(results.rows(metrics)))
    rows = []
    for section in sections:
        named = f"{section.model}: " if len(sections) > 1 else ""
        rows += [[named + choice.budget, f"{choice.run or 'nothing'}: {choice.why}"] for choice in section.choices]
    tables = [(section.model, *comparison_page.table(section)) for section in sections]
    return Comparison(output / "compare.html", [(m, head, [row for row, _ in own]) for m, head, own in tables], rows)


def _once(paths: Sequence[Path]) -> list[Path]:
    return list(dict.fromkeys(path.resolve() for path in paths))


def _compared(runs: Sequence[dict[str, Any]], room: Sequence[Budget], context: int) -> list[Section]:
    try:
        return compare_runs(runs, room, context)
    except Incomparable as error:
        raise ConfigError(str(error)) from error


def metrics_below(path: Path) -> list[Path]:
    """The metrics.json that a path means: itself, that of a run, or those of all runs below a folder.

    Raises:
        ConfigError: there is none.
    """
    if not path.is_dir():
        if not path.exists():
            raise ConfigError(f"{path} does not exist; expected a folder of runs, a checkpoint, or a {METRICS}")
        return [path]
    if (path / METRICS).exists():
        return [path / METRICS]
    below = (file for depth in range(1, _DEEP + 1) for file in path.glob("*/" * depth + METRICS))
    runs = sorted(file for file in below if not is_checkpoint(file.parent))
    if not runs:
        raise ConfigError(
            f"{path} holds no checkpoint and no {METRICS}, nor do folders below it; has a run finished there?"
        )
    return runs


def _bytes(text: str) -> float:
    amount = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)?", text.strip(), re.IGNORECASE)
    if not amount:
        raise ConfigError(f"--budget {text}: expected an amount of memory, such as 6GB, 500MB or 8GiB")
    return float(amount[1]) * _UNITS[(amount[2] or "GB").upper()]
