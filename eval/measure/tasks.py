"""Tasks such as arc_easy, by lm-eval (EleutherAI), which is an extra."""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from .statistics import finite

_BATCH = 8


def available() -> bool:
    """Whether lm-eval is installed."""
    return find_spec("lm_eval") is not None


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    limit: int | None,
    fewshot: int | None = None,
    chat_template: bool = False,
) -> list[dict[str, Any]]:
    """lm-eval's scores, by each task's own defaults.

    Args:
        model, tokenizer: transformers', as loaded.
        tasks: names that lm-eval knows. limit: documents of each task; None for all.
        fewshot: solved examples before each document; None for the task's own number.
        chat_template: whether documents are put as a user's turn, by the tokenizer's chat template.
    Returns:
        For each task and metric {"task", "metric", "filter", "value", "standard_error", "samples", "version",
        "scores"}. "scores" has one number per document, in lm-eval's order; None where a document has no score of its
        own, as for a perplexity.
    Raises:
        ValueError: lm-eval does not know a task, or cannot load its data.
    """
    lm_eval, adapter = import_module("lm_eval"), import_module("lm_eval.models.huggingface")
    wrapped = adapter.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH)
    try:
        results = lm_eval.simple_evaluate(
            wrapped,
            tasks=list(tasks),
            limit=limit,
            num_fewshot=fewshot,
            apply_chat_template=chat_template,
            log_samples=True,
        )
    except (KeyError, OSError) as error:
        raise ValueError(f"lm-eval cannot run {', '.join(tasks)}: {error}") from error
    lines = []
    for task, figures in results["results"].items():
        for key, value in figures.items():  # "metric,filter" and "metric_stderr,filter"
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            samples = results.get("samples", {}).get(task, [])
            samples = [sample for sample in samples if sample.get("filter", filter_name) == filter_name]
            scores: list[Any] = [sample.get(metric) for sample in sorted(samples, key=lambda s: s["doc_id"])]
            standard_error = figures.get(f"{metric}_stderr,{filter_name}")
            lines.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": filter_name,
                    "value": value,
                    # lm-eval writes "N/A" where there is none
                    "standard_error": standard_error if isinstance(standard_error, float) else None,
                    "samples": results.get("n-samples", {}).get(task, {}).get("effective"),
                    "version": results.get("versions", {}).get(task),
                    "scores": [float(score) for score in scores] if scores and all(map(finite, scores)) else None,
                }
            )
    return lines
