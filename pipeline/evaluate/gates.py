"""Gates: what a quantized model must reach to be passed on."""

from collections.abc import Callable
from typing import Any

from ..config.schema import Gates


def _percent(value: float) -> str:
    return f"{100 * value:.4g}%"


# gate -> what it is called, how it is written, and whether it is a least and not a most
_GATES: dict[str, tuple[str, Callable[[float], str], bool]] = {
    "kl_mean": ("mean KL", "{:.4g}".format, False),
    "ppl_increase": ("the increase of perplexity", _percent, False),
    "top1": ("top-1 agreement", _percent, True),
    "fallback_layers": ("the number of layers that fell back to absmax", str, False),
}


def judge(gates: Gates, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Each gate that is set against what was measured, in plain values.

    Args:
        metrics: of a quantized model; see results.assemble.
    Returns:
        For each {"gate", "limit", "found", "passed", "said"}; a figure that was not measured passes no gate.
    """
    quality, layers = metrics["quality"], metrics["coverage"]["layers"]
    ratio = quality["perplexity_ratio"]
    figures = {
        "kl_mean": quality["kl_mean"],
        "ppl_increase": None if ratio is None else ratio - 1,
        "top1": quality["top1_agreement"],
        "fallback_layers": sum(bool(layer.get("fallback")) for layer in layers),
    }
    limits = {gate: limit for gate, limit in gates.model_dump().items() if limit is not None}
    return [_judged(gate, limit, figures[gate]) for gate, limit in limits.items()]


def _judged(gate: str, limit: float, figure: float | None) -> dict[str, Any]:
    name, words, least = _GATES[gate]
    passed = figure is not None and (figure >= limit if least else figure <= limit)
    shown = "was not measured" if figure is None else f"is {words(figure)}"
    wanted = f"gates.{gate} asks for at {'least' if least else 'most'} {words(limit)}"
    said = f"{name} {shown}, {'as' if passed else 'but'} {wanted}"
    return {"gate": gate, "limit": limit, "found": figure, "passed": passed, "said": said}


def verdict(gates: Gates, metrics: dict[str, Any], override: bool) -> dict[str, Any] | None:
    """What metrics.json has of the gates; None where none is set. override: misses are accepted."""
    judged = judge(gates, metrics)
    passed = not missed(judged)
    return {"passed": passed, "overridden": not passed and override, "judged": judged} if judged else None


def missed(judged: list[dict[str, Any]]) -> list[str]:
    """A sentence for each gate that was missed."""
    return [entry["said"] for entry in judged if not entry["passed"]]
