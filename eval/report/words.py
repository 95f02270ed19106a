"""Numbers and texts as a page shows them; a dash stands for what was not measured."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

DASH = "–"
KERNEL_KL = (
    "KL added by the kernel: the kernel also rounds the inputs of layers whose scheme quantizes only the weights. The "
    "figure is the mean KL of the model with this rounding from the same model without it, on some of the windows. "
    "Mean KL and perplexity are measured without it: they belong to the file, and this figure belongs to the kernel."
)
TERMS = (
    "Perplexity: how much the text surprises the model; less is better. KL: how far its predictions of the next token "
    "moved from the unquantized model's, in nats; 0 is not at all. Top-1: how often the most probable next token is "
    "the same. Resident: the loaded weights in memory. Peak RSS: the most memory that the process took. Prefill reads "
    "a prompt, decode writes token by token."
)
# Control characters, characters that XML forbids, and those that reverse the direction of the text around them.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]")


def over(value: float | None, reference: float | None) -> float | None:
    """value / reference, or None where one is missing."""
    return value / reference if value is not None and reference else None


def followed(text: str, extra: str | None) -> str:
    """The text with something in brackets behind it, where both exist."""
    return text if extra in (None, DASH) or text == DASH else f"{text} ({extra})"


def number(value: float | None) -> str:
    """Perplexities and bits: two decimals while they matter."""
    return DASH if value is None else f"{value:,.{2 if value < 100 else 1 if value < 1000 else 0}f}"


def count(value: float | None) -> str:
    return DASH if value is None else f"{value:,.{0 if value >= 100 or value % 1 == 0 else 1}f}"


def small(value: float | None) -> str:
    if value is None:
        return DASH
    return f"{value:.2g}" if value < 1e-3 else f"{value:.4f}".rstrip("0").rstrip(".")


def fine(value: float | None) -> str:
    """Ratios near 1, and their errors."""
    return DASH if value is None else f"{value:.4f}"


def seconds(value: float | None) -> str:
    if value is None:
        return DASH
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def ratio(value: float | None) -> str:
    return DASH if value is None else f"{value:,.{2 if value < 10 else 0}f}x"


def percent(value: float | None, digits: int = 1) -> str:
    return DASH if value is None else f"{100 * value:.{digits}f}%"


def hundredths(value: float | None) -> str:
    """Shares beside their errors, which are small."""
    return percent(value, 2)


def increase(after: float | None, before: float | None) -> str | None:
    """The change in percent, with its sign."""
    if (quotient := over(after, before)) is None:
        return None
    change = 100 * (quotient - 1)
    return f"{change:+,.{2 if abs(change) < 0.1 else 1 if abs(change) < 100 else 0}f}%"


def size(value: float | None) -> str:
    """Three digits in decimal units."""
    if value is None:
        return DASH
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= 0.9995 * one:
            scaled = value / one
            return f"{scaled:,.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f} {unit}"
    return f"{value:.0f} B"


def cache_per_token(memory: Mapping[str, Any]) -> str:
    """What a token's keys and values take, and those of layers that keep the last tokens only."""
    windows = memory.get("kv_cache_windows") or []
    kept = [f"{size(window['bytes_per_token'])} of the last {window['tokens']:,.0f}" for window in windows]
    own = " + ".join([size(memory.get("kv_cache_bytes_per_token")), *kept])
    if cache := memory.get("kv_cache"):
        return f"{own} ({cache['type']}; {cache_per_token(cache)} unquantized)"
    return own


def markdown_text(value: Any) -> Any:
    """Text that GitHub Markdown shows as it is, in a cell of a table too. Markup is not changed."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    text = re.sub(r"([\\`*_\[\]|#~$!])", r"\\\1", " ".join(value.split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def fenced(text: str, language: str = "") -> Markup:
    """A code block of Markdown that its content cannot close."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Markup(f"{fence}{language}\n{text}\n{fence}")


def printable(value: Any) -> Any:
    """The same data, without characters that could break a page; letters of all scripts stay."""
    if isinstance(value, str):
        return _UNPRINTABLE.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {printable(key): printable(item) for key, item in value.items()}
    return [printable(item) for item in value] if isinstance(value, list | tuple) else value


def terms_html(title: str, rows: Iterable[Sequence[Any]]) -> str:
    """A table of names and values for a notebook; everything in it may come from a checkpoint, and is escaped."""
    left = "style='text-align:left'"
    cells = (
        f"<tr><th {left}>{escape(printable(str(name)))}</th><td {left}>{escape(printable(str(value)))}</td></tr>"
        for name, value in rows
    )
    return f"<table><caption>{escape(printable(title))}</caption>{''.join(cells)}</table>"


def plus_minus(value: float | None, error: float | None, words: Callable[[float | None], str]) -> str:
    """A value and its standard error, both in the same words."""
    return followed(words(value), None if error is None else f"± {words(error)}")


def known(value: float | None, error: float | None) -> tuple[str, str]:
    """A value with as many digits as its standard error allows, and the error ("" where there is none).

    For example 0.00435 and 0.00005. An error that begins with 1 has two digits.
    """
    if value is None or not error or not math.isfinite(error):
        return small(value), "" if error is None else small(error)
    power = math.floor(math.log10(error))
    digits = max(0, -power + (error < 2 * 10**power))
    return f"{value:.{digits}f}", f"{error:.{digits}f}"


def divergence(value: float | None, error: float | None) -> str:
    """A KL and its standard error."""
    words, spread = known(value, error)
    return followed(words, f"± {spread}" if spread else None)


def facts_of(metrics: Mapping[str, Any]) -> list[list[str]]:
    """The figures of one model as lines of a name and a value, for a terminal."""
    quality, memory, kernels = metrics["quality"], metrics["memory"], metrics["kernels"]
    rows = [["perplexity", plus_minus(quality["perplexity"], quality["perplexity_se"], number)]]
    if quality["path"]:
        ratio_error = quality["perplexity_ratio_se"]
        rows += [
            ["baseline's perplexity", number(quality["baseline_perplexity"])],
            ["ratio of perplexities", plus_minus(quality["perplexity_ratio"], ratio_error, fine)],
            ["mean KL", divergence(quality["kl_mean"], quality["kl_mean_se"])],
            ["KL: median, 99%, largest", ", ".join(small(quality[f"kl_{key}"]) for key in ("median", "p99", "max"))],
            ["same next token", plus_minus(quality["top1_agreement"], quality["top1_agreement_se"], percent)],
            ["compared", quality["path"]],
        ]
    if cost := kernels.get("rounded_inputs"):
        rows.append(["KL added by the kernel", divergence(cost["kl_mean"], cost["kl_mean_se"])])
    rows += [[line["task"], f"{line['metric']} {small(line['value'])}"] for line in metrics["tasks"]]
    rows += [["resident weights", size(memory["resident_bytes"])], ["peak RSS", size(memory["peak_rss_bytes"])]]
    rows += [["cache per token", cache_per_token(memory)]]
    for speed in metrics["speed"]:
        if "skipped" in speed:
            rows.append([f"tokens/s, batch {speed['batch']}, prompt {speed['prompt']}", speed["skipped"]])
            continue
        rates = f"{speed['prefill']['median']:.0f} prefill, {speed['decode']['median']:.1f} decode"
        rows.append([f"tokens/s, batch {speed['batch']}, prompt {speed['prompt']}", rates])
    rows += [[f"kernel {name}", f"{layers} layers"] for name, layers in kernels.get("selected", {}).items()]
    if fused := kernels.get("fused"):
        why = "; ".join(f"{count}: {reason}" for reason, count in fused["why"].items())
        rows.append(["decoder layers in one call", f"{fused['fused']} of {fused['of']}{f' ({why})' if why else ''}"])
        if fused["fused"] == fused["of"] and "around" in fused:
            why = fused["apart"] or fused["around"]
            rows.append(["a token in one call", f"no: {why}" if why else "yes"])
    return rows + [["warning", warning] for warning in metrics.get("warnings") or []]
