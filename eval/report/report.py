"""The report: what one or more runs measured, as table rows, Markdown and one self-contained HTML page.

A run is a metrics.json as a dict. Runs come in any order and may be of several models; the baseline of a
model is its run with scheme "none" and may be missing. All text in a run is taken for hostile: names come
from checkpoints.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from . import render
from . import words as say
from .runs import Entry, Metrics, circumstances, dig, distinct, entries_of, facts_of, finite, points_of
from .tables import tables
from .words import DASH


def summary_rows(runs: Sequence[Metrics]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the summary, one row per run, each model's baseline first.

    Missing values are an en dash. Sizes are decimal (1 MB = 10^6 bytes), speeds are tokens per second, and
    what stands in brackets compares with the baseline.
    """
    entries = entries_of(runs)
    points = points_of(entries)
    cuda = any(entry.get("memory", "peak_cuda_bytes") is not None for entry in entries)
    several = len({entry.model for entry in entries}) > 1
    header = ["scheme", "method/format", "file size", "bits/weight quantized/blocks/all", "perplexity", "mean KL"]
    header = ["model"] * several + header + ["top-1", "resident", "peak RSS"] + ["peak CUDA"] * cuda
    header += [f"{phase} tok/s {name}" for name in points.values() for phase in ("prefill", "decode")]
    rows = []
    for entry in entries:
        after, before = entry.perplexities()
        increase = None if entry.is_baseline else say.increase(after, before)
        bits = [say.number(entry.get("size", "bits_per_weight", which)) for which in ("quantized", "decoder", "all")]
        how = [entry.get(key) or DASH for key in ("method", "format")]
        row = [entry.model] * several + [entry.label, DASH if how == [DASH, DASH] else "/".join(how)]
        row.append(say.followed(say.size(entry.get("size", "file_bytes")), say.ratio(entry.size_ratio())))
        row += [" / ".join(bits), say.followed(say.number(after), increase), say.small(entry.get("quality", "kl_mean"))]
        row.append(say.percent(entry.get("quality", "top1_agreement")))
        memory = ["resident_bytes", "peak_rss_bytes"] + ["peak_cuda_bytes"] * cuda
        row += [say.size(entry.get("memory", key)) for key in memory]
        for point in points:
            for phase in ("prefill", "decode"):
                speed = entry.speed(point, phase)
                row.append(say.followed(say.count(speed and speed[0]), say.ratio(entry.speed_against(point, phase)[0])))
        rows.append(row)
    return header, rows


def verdicts(runs: Sequence[Metrics]) -> list[tuple[str, str]]:
    """One plain sentence per quantized run, as (run, sentence): what it saved and what that cost."""
    entries = entries_of(runs)
    found = [(entry.title, _verdict(entry)) for entry in entries if not entry.is_baseline]
    return found or [(entry.title, "the unquantized baseline, for comparison only") for entry in entries]


def markdown(runs: Sequence[Metrics], refused: Sequence[tuple[str, str, str]] = ()) -> str:
    """The report as GitHub Markdown, without the plots. refused: model, recipe and reason of jobs without figures."""
    return render.markdown("report", {**_view(runs), "refused": say.printable(refused)})


def html(runs: Sequence[Metrics], refused: Sequence[tuple[str, str, str]] = ()) -> str:
    """The report as one HTML page that needs no other file and no network. Arguments as of markdown."""
    return render.html("report", {**_view(runs), "refused": say.printable(refused), "figures_of": _figures})


def card(runs: Sequence[Metrics], page: Mapping[str, Any]) -> str:
    """The body of a model card, as Markdown: the report's words and tables, and what its `page` says besides.

    Args:
        runs: the run that the card is of, and its baseline where there is one.
        page: see pipeline/card.py, which makes it.
    """
    return render.markdown("card", {**_view(runs), **say.printable(page)})


def pictures(runs: Sequence[Metrics]) -> list[tuple[str, bytes]]:
    """(caption, PNG) of each figure of one model's runs."""
    from .figures import model_figures

    entries = entries_of(runs)
    return [(caption, drawing.png()) for caption, drawing in model_figures(entries, points_of(entries))]


def _view(runs: Sequence[Metrics]) -> dict[str, Any]:
    """Everything the templates show, in words."""
    entries = entries_of(runs)
    header, rows = summary_rows(runs)
    models = list(dict.fromkeys(entry.model for entry in entries))
    quantized = [entry for entry in entries if not entry.is_baseline]
    groups = {model: [entry for entry in entries if entry.model == model] for model in models}
    return {
        "title": models[0] if len(models) == 1 else f"{len(models)} models",
        "models": [(model, facts_of(own[0].run.get("model")), own) for model, own in groups.items()],
        "verdicts": verdicts(runs),
        "tables": tables(entries, points_of(entries)),
        "without_baseline": [model for model, own in groups.items() if not any(e.is_baseline for e in own)],
        "header": header,
        "rows": [(row, entry.is_baseline) for row, entry in zip(rows, entries, strict=True)],
        "label_columns": 2 if len(models) > 1 else 1,
        "quantized": [_checks(entry) for entry in quantized],
        "learned": distinct(quantized, lambda run: facts_of(run.get("calibration"))),
        "special": [(entry.title, special) for entry in quantized if (special := _special(entry))],
        "kept": distinct(quantized, lambda run: _kept(dig(run, "coverage", "kept") or [])),
        "rejected": distinct(quantized, lambda run: list((dig(run, "kernels", "rejected") or {}).items())),
        **circumstances(entries),
    }


def _verdict(entry: Entry) -> str:
    parts = []
    if (ratio := entry.size_ratio()) is not None:
        parts.append(f"{say.ratio(ratio)} the size")
    after, before = entry.perplexities()
    if after is not None and before is not None:
        parts.append(f"perplexity {say.number(before)} → {say.number(after)} ({say.increase(after, before)})")
    elif after is not None:
        parts.append(f"perplexity {say.number(after)}")
    missed = [x["gate"] for x in entry.get("gates", "judged") or [] if not x["passed"]]
    if missed:
        parts.insert(0, f"misses {'its gate' if len(missed) == 1 else 'its gates'} {', '.join(missed)}")
    if (agreement := entry.get("quality", "top1_agreement")) is not None:
        parts.append(f"same next token {say.percent(agreement)} of the time")
    return ", ".join([*parts, *_speed_words(entry)]) or "nothing was measured"


def _speed_words(entry: Entry) -> list[str]:
    """Decode at the smallest batch, then everything else that became slower."""
    points = points_of([entry])
    found = [(phase, p, *entry.speed_against(p, phase)) for p in points for phase in ("decode", "prefill")]
    known = [(phase, points[p], ratio, verdict) for phase, p, ratio, verdict in found if ratio is not None]
    words, others = [], "slower than the baseline"
    if known and known[0][0] == "decode":
        _, _, ratio, verdict = known.pop(0)
        text = {"faster": "decode {} faster", "same": "decode {} (no clear difference)"}
        words.append(text.get(verdict, "{} the decode speed: slower than the baseline").format(say.ratio(ratio)))
        others = "also slower" if verdict == "slower" else others
    slower = [f"{phase} {name} ({say.ratio(x)})" for phase, name, x, verdict in known if verdict == "slower"]
    if slower:
        more = f" and {len(slower) - 3} more" if len(slower) > 3 else ""
        words.append(f"{others}: {', '.join(slower[:3])}{more}")
    return words


def _checks(entry: Entry) -> dict[str, Any]:
    """Coverage, reload check and kernels of one quantized run, in words."""
    coverage, reload, kernels = (entry.get(key) or {} for key in ("coverage", "reload", "kernels"))
    layers = coverage.get("layers") or []
    known = [layer for layer in layers if finite(layer.get("relative_error"))]
    worst = max(known, key=lambda layer: layer["relative_error"], default=None)
    outputs = [x["output_error"] for x in layers if finite(x.get("output_error"))]
    share = coverage.get("share")
    # Rounding must not claim that everything was quantized.
    part = "over 99.9%" if share is not None and 0.9995 <= share < 1 else say.percent(share)
    difference, tolerance = reload.get("max_difference"), reload.get("tolerance")
    passed = None if difference is None or tolerance is None else difference <= tolerance
    return {
        "title": entry.title,
        "share": f"{part} of {say.size(coverage.get('decoder_bytes'))}",
        "layers": str(len(layers)) if layers else DASH,
        "mean_error": say.percent(sum(x["relative_error"] for x in known) / len(known), 2) if known else DASH,
        "output_error": say.percent(sum(outputs) / len(outputs), 2) if outputs else DASH,
        "worst": f"{worst['name']} ({say.percent(worst['relative_error'], 2)})" if worst else DASH,
        "reload": DASH if passed is None else "passed" if passed else "FAILED",
        "difference": say.small(difference),
        "tolerance": say.small(tolerance),
        "tokens": say.count(reload.get("tokens")),
        "kernels": ", ".join(f"{name} × {n}" for name, n in (kernels.get("selected") or {}).items()) or DASH,
        "rounded": say.rounded_inputs(kernels),
    }


def _special(entry: Entry) -> list[str]:
    """Layers that were not quantized as asked, and why."""
    layers = entry.get("coverage", "layers") or []
    fallen = [f"{x['name']} fell back to absmax: {x['fallback']}" for x in layers if x.get("fallback")]
    return fallen + [f"{x['name']}: {x['note']}" for x in layers if x.get("note")]


def _kept(tensors: Iterable[Metrics]) -> list[tuple[str, str, str, str]]:
    """(name, count, bytes, reason) of what was not quantized, largest first, blocks put together."""
    groups: dict[tuple[str, str], list[Metrics]] = {}
    for tensor in tensors:
        name = str(tensor.get("name"))
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        reason = str(tensor.get("reason") or DASH).replace(name, pattern)
        groups.setdefault((pattern, reason), []).append(tensor)
    rows = []
    for (pattern, reason), own in groups.items():
        total = sum(tensor.get("bytes") or 0 for tensor in own)
        rows.append((-total, str(own[0].get("name")) if len(own) == 1 else pattern, len(own), reason))
    return [(name, f"{count:,}", say.size(-total), reason) for total, name, count, reason in sorted(rows)]


def _figures(entries: Sequence[Entry], ident: str) -> list[tuple[str, Markup]]:
    from .figures import model_figures

    drawn = enumerate(model_figures(entries, points_of(entries)))
    return [(caption, Markup(drawing.svg(f"{ident}-{number}"))) for number, (caption, drawing) in drawn]
