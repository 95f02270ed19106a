"""Finished runs -> compare.html, compare.md and compare.json."""

import re
from collections.abc import Sequence
from pathlib import Path

from bitpress.eval import compare_page
from bitpress.eval.choice import Budget
from bitpress.eval.compare import Incomparable
from bitpress.eval.compare import compare as compare_runs

from . import store
from .errors import ConfigError
from .metrics import read_metrics

METRICS = "metrics.json"
_DEEP = 4  # folders: output, name, model, scheme
_UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def compare(paths: Sequence[Path], output: Path, budgets: Sequence[str], context: int) -> tuple[Path, list[list[str]]]:
    """Write the comparison of these runs.

    Returns:
        The page, and rows of a budget and what to choose for it, for a terminal.
    Raises:
        ConfigError: no runs, runs that do not compare, or a budget that is no amount of memory.
        CheckpointError: a metrics.json that cannot be used.
    """
    room = [Budget(budget, _bytes(budget)) for budget in budgets]
    files = list(dict.fromkeys(file.resolve() for path in paths for file in _metrics(path.expanduser())))
    runs = [read_metrics(file) for file in files]
    try:
        sections = compare_runs(runs, room, context)
    except Incomparable as error:
        raise ConfigError(str(error)) from error
    store.make_folder(output)
    store.write_json(output / "compare.json", compare_page.plain(sections))
    store.write_text(output / "compare.md", compare_page.markdown(sections))
    store.write_text(output / "compare.html", compare_page.html(sections))
    rows = []
    for section in sections:
        named = f"{section.model}: " if len(sections) > 1 else ""
        rows += [[named + choice.budget, f"{choice.run or 'nothing'}: {choice.why}"] for choice in section.choices]
    return output / "compare.html", rows


def _metrics(path: Path) -> list[Path]:
    """The metrics.json that a path means: itself, that of a run, or those of all runs below a folder."""
    if not path.is_dir():
        if not path.exists():
            raise ConfigError(f"{path} does not exist; expected a run's folder, a folder of runs, or a {METRICS}")
        return [path]
    if (path / METRICS).exists():
        return [path / METRICS]
    found = sorted(file for depth in range(1, _DEEP + 1) for file in path.glob("*/" * depth + METRICS))
    if not found:
        raise ConfigError(f"{path} holds no {METRICS}, nor do folders below it; has a run finished there?")
    return found


def _bytes(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)?", text.strip(), re.IGNORECASE)
    if not found:
        raise ConfigError(f"--budget {text}: expected an amount of memory, such as 6GB, 500MB or 8GiB")
    return float(found[1]) * _UNITS[(found[2] or "GB").upper()]
