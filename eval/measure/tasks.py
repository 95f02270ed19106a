"""Tasks such as arc_easy, by lm-eval (EleutherAI), which is an extra."""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ..report.runs import finite

_BATCH = 8


def available() -> bool:
    return find_spec("lm_eval") is not None


def run_tasks(model: Any, tokenizer: Any, tasks: Sequence[str], limit: int | None) -> list[dict[str, Any]]:
    """What lm-eval finds, by each task's own defaults.

    Args:
        model, tokenizer: transformers', as loaded.
        tasks: names that lm-eval knows. limit: documents of each task; None for all.
    Returns:
        For each task and metric {"task", "metric", "filter", "value", "standard_error", "samples", "version",
        "scores"}; the last are the documents' own, in lm-eval's order, None where they have none, as for a perplexity.
    Raises:
        ValueError: lm-eval does not know a task, or its data could not be had.
    """
    lm_eval, adapter = import_module("lm_eval"), import_module("lm_eval.models.huggingface")
    wrapped = adapter.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH)
    try:
        found = lm_eval.simple_evaluate(wrapped, tasks=list(tasks), limit=limit, log_samples=True)
    except (KeyError, OSError) as error:
        raise ValueError(f"lm-eval cannot run {', '.join(tasks)}: {error}") from error
    return [line for task, figures in found["results"].items() for line in _lines(task, figures, found)]


def _lines(task: str, figures: dict[str, Any], found: dict[str, Any]) -> list[dict[str, Any]]:
    """lm-eval's "metric,filter" and "metric_stderr,filter" -> one line for each metric."""
    lines = []
    for key, value in figures.items():
        metric, comma, by = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = figures.get(f"{metric}_stderr,{by}")
        lines.append(
            {
                "task": task,
                "metric": metric,
                "filter": by,
                "value": value,
                "standard_error": error if isinstance(error, float) else None,  # "N/A" where there is none
                "samples": found.get("n-samples", {}).get(task, {}).get("effective"),
                "version": found.get("versions", {}).get(task),
                "scores": _scores(found.get("samples", {}).get(task, []), metric, by),
            }
        )
    return lines


def _scores(samples: Sequence[dict[str, Any]], metric: str, by: str) -> list[float] | None:
    ordered = sorted((sample for sample in samples if sample.get("filter", by) == by), key=lambda s: s["doc_id"])
    scores: list[Any] = [sample.get(metric) for sample in ordered]
    return [float(score) for score in scores] if scores and all(map(finite, scores)) else None
