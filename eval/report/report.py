"""The report: what one or more runs measured, as table rows, Markdown and one self-contained HTML page.

A run is a metrics.json as a dict. Runs come in any order and may be of several models. The baseline of a model is its
run with the scheme "none", and may be missing. All text in a run counts as hostile: names come from checkpoints.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ..measure.statistics import finite
from . import render
from . import words as say
from .comparison import Incomparable, compare
from .recommend import Choice
from .runs import Metrics, ReportedRun, circumstances, dig, distinct, points_of, reported_runs, terms_of
from .tables import recipe_table, tables
from .words import DASH

Refused = Sequence[tuple[str, str, str]]  # jobs that did not finish: model, recipe, the reason in a sentence


def summary_rows(runs: Sequence[Metrics]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the summary, one row for each run, each model's baseline first.

    Missing values are an en dash. Sizes are decimal (1 MB = 10^6 bytes), speeds are tokens per second. A comparison
    with the baseline stands in brackets behind a value.
    """
    return _summary_rows(reported_runs(runs))


def _summary_rows(reported: Sequence[ReportedRun]) -> tuple[list[str], list[list[str]]]:
    points = points_of(reported)
    cuda = any(run.get("memory", "peak_cuda_bytes") is not None for run in reported)
    kernel = any(run.get("kernels", "rounded_inputs") for run in reported)
    several = len({run.model for run in reported}) > 1
    header = ["model"] * several + ["run", "method/format", "file size", "bits/weight quantized/blocks/all"]
    header += ["perplexity", "mean KL"] + ["KL added by the kernel"] * kernel
    header += ["top-1", "resident", "peak RSS"] + ["peak CUDA"] * cuda
    header += [f"{phase} tok/s {name}" for name in points.values() for phase in ("prefill", "decode")]
    rows = []
    for run in reported:
        after, before = run.perplexities()
        increase = None if run.is_baseline else say.increase(after, before)
        bits = [say.number(run.get("size", "bits_per_weight", which)) for which in ("quantized", "decoder", "all")]
        row = [run.model] * several + [run.label, run.method_and_format]
        row.append(say.followed(say.size(run.get("size", "file_bytes")), say.ratio(run.size_ratio())))
        row += [" / ".join(bits), say.followed(say.number(after), increase), say.small(run.get("quality", "kl_mean"))]
        row += [say.small(run.get("kernels", "rounded_inputs", "kl_mean"))] * kernel
        row.append(say.percent(run.get("quality", "top1_agreement")))
        memory = ["resident_bytes", "peak_rss_bytes"] + ["peak_cuda_bytes"] * cuda
        row += [say.size(run.get("memory", key)) for key in memory]
        for point in points:
            for phase in ("prefill", "decode"):
                speed = run.speed(point, phase)
                row.append(say.followed(say.count(speed and speed[0]), say.ratio(run.speed_against(point, phase)[0])))
        rows.append(row)
    return header, rows


def verdicts(runs: Sequence[Metrics]) -> list[tuple[str, str]]:
    """(run, sentence) for each quantized run: what it saved, and what that cost."""
    return _verdicts(reported_runs(runs))


def _verdicts(reported: Sequence[ReportedRun]) -> list[tuple[str, str]]:
    sentences = [(run.title, _verdict(run)) for run in reported if not run.is_baseline]
    return sentences or [(run.title, "the unquantized baseline, for comparison only") for run in reported]


def markdown(runs: Sequence[Metrics], refused: Refused = ()) -> str:
    """The report as GitHub Markdown, without the plots.

    Args:
        refused: (model, recipe, reason) of each job that did not finish.
    """
    return render.markdown("report", _view(runs, refused))


def html(runs: Sequence[Metrics], refused: Refused = ()) -> str:
    """The report as one HTML page that needs no other file and no network. Arguments as for markdown."""
    return render.html("report", {**_view(runs, refused), "figures_of": _figures})


def card(runs: Sequence[Metrics], page: Mapping[str, Any]) -> str:
    """The body of a model card as Markdown: the words and tables of the report, and those of `page`.

    Args:
        runs: the run that the card is about, and its baseline where there is one.
        page: what else the card says; see pipeline/publish/card.py.
    """
    quantized = [run for run in reported_runs(runs) if not run.is_baseline]
    return render.markdown("card", {**_view(runs), "apart": _apart(quantized[-1]), **say.printable(page)})


def _apart(run: ReportedRun) -> list[tuple[str, str]]:
    """(whose, sentence): the quality of the file, and what the kernel adds that measured it."""
    quality, cost = run.get("quality") or {}, run.get("kernels", "rounded_inputs")
    after, before = run.perplexities()
    figures = []
    if after is not None:
        figures.append(f"perplexity {say.followed(say.number(after), say.increase(after, before))}")
    if quality.get("kl_mean") is not None:
        figures.append(f"mean KL {say.divergence(quality['kl_mean'], quality.get('kl_mean_se'))}")
    if quality.get("top1_agreement") is not None:
        figures.append(f"the same next token {say.percent(quality['top1_agreement'])} of the time")
    known = ", ".join(figures) or "not measured"
    names = ", ".join(run.get("kernels", "selected") or {}) or "bitpress's kernel"
    if cost:
        divergence = say.divergence(cost.get("kl_mean"), cost.get("kl_mean_se"))
        added = f"{names} also rounds the inputs of {cost.get('layers')} layers, which adds a mean KL of {divergence}"
    else:
        added = f"{names} computes with inputs as the scheme has them and adds nothing that was measured"
    return [
        (
            "Quality of the file",
            f"{known}. Weights and inputs are those of the scheme, whatever runtime loads the file.",
        ),
        ("Of the kernel", f"{added}. It is bitpress's on the machine below; another runtime's kernel has its own."),
    ]


def pictures(runs: Sequence[Metrics]) -> list[tuple[str, bytes]]:
    """(caption, PNG) of each figure of one model's runs."""
    from .figures import model_figures  # matplotlib takes a second to import, and Markdown does not need it

    reported = reported_runs(runs)
    return [(caption, drawing.png()) for caption, drawing in model_figures(reported, points_of(reported))]


def _view(runs: Sequence[Metrics], refused: Refused = ()) -> dict[str, Any]:
    """Everything that the templates show, in words."""
    reported = reported_runs(runs)
    header, rows = _summary_rows(reported)
    by_model: dict[str, list[ReportedRun]] = {}
    for run in reported:
        by_model.setdefault(run.model, []).append(run)
    models = list(by_model) or list(dict.fromkeys(say.printable(model) for model, _, _ in refused))
    quantized = [run for run in reported if not run.is_baseline]
    several = len(by_model) > 1
    return {
        "title": models[0] if len(models) == 1 else f"{len(models)} models",
        "models": [
            # The identity is among the hashes.
            (model, [pair for pair in terms_of(own[0].run.get("model")) if pair[0] != "identity"], own)
            for model, own in by_model.items()
        ],
        "verdicts": _verdicts(reported),
        "choices": _choices(runs),
        "terms": say.TERMS,
        "warnings": [(run.title, warning) for run in reported for warning in run.get("warnings") or []],
        "refused": say.printable([tuple(map(str, job)) for job in refused]),
        "tables": tables(reported, points_of(reported)),
        "without_baseline": [model for model, own in by_model.items() if not any(run.is_baseline for run in own)],
        "header": header,
        "rows": [(row, run.is_baseline) for row, run in zip(rows, reported, strict=True)],
        "label_columns": 2 if several else 1,
        "kernel_kl": say.KERNEL_KL if any(run.get("kernels", "rounded_inputs") for run in reported) else "",
        "quantized": [_checks(run) for run in quantized],
        "recipes": recipe_table(reported),
        "rules": [(names, pairs) for names, pairs in distinct(quantized, _rules) if pairs],
        "calibration": distinct(quantized, lambda run: terms_of(run.get("calibration"))),
        "deviations": [(run.title, layers) for run in quantized if (layers := _deviations(run))],
        "kept": distinct(quantized, _kept),
        "unused_kernels": distinct(quantized, lambda run: list((dig(run, "kernels", "rejected") or {}).items())),
        **circumstances(reported),
    }


def _verdict(run: ReportedRun) -> str:
    parts = []
    if missed := [gate["gate"] for gate in run.get("gates", "judged") or [] if not gate["passed"]]:
        parts.append(f"misses {'its gate' if len(missed) == 1 else 'its gates'} {', '.join(missed)}")
    if (kl := run.get("quality", "kl_mean")) is not None:
        parts.append(f"mean KL {say.divergence(kl, run.get('quality', 'kl_mean_se'))}")
    if (ratio := run.size_ratio()) is not None:
        parts.append(f"{say.ratio(ratio)} the size")
    after, before = run.perplexities()
    if after is not None and before is not None:
        parts.append(f"perplexity {say.number(before)} → {say.number(after)} ({say.increase(after, before)})")
    elif after is not None:
        parts.append(f"perplexity {say.number(after)}")
    if (agreement := run.get("quality", "top1_agreement")) is not None:
        parts.append(f"same next token {say.percent(agreement)} of the time")
    # Decode at the smallest batch, then everything else that became slower.
    points = points_of([run])
    speeds = [(phase, p, *run.speed_against(p, phase)) for p in points for phase in ("decode", "prefill")]
    known = [(phase, points[p], ratio, verdict) for phase, p, ratio, verdict in speeds if ratio is not None]
    others = "slower than the baseline"
    if known and known[0][0] == "decode":
        _, _, ratio, verdict = known.pop(0)
        sentence = {"faster": "decode {} faster", "same": "decode {} (no clear difference)"}
        parts.append(sentence.get(verdict, "{} the decode speed: slower than the baseline").format(say.ratio(ratio)))
        others = "also slower" if verdict == "slower" else others
    if slower := [f"{phase} {name} ({say.ratio(x)})" for phase, name, x, verdict in known if verdict == "slower"]:
        more = f" and {len(slower) - 3} more" if len(slower) > 3 else ""
        parts.append(f"{others}: {', '.join(slower[:3])}{more}")
    return ", ".join(parts) or "nothing was measured"


def _choices(runs: Sequence[Metrics]) -> list[tuple[str, list[Choice]]]:
    """(model, which run to choose by memory) where there is a choice: several quantized runs that compare."""
    try:
        sections = compare(runs) if runs else []
    except Incomparable:  # of several protocols, which the page says
        return []
    return [(x.model, x.choices) for x in sections if x.choices and sum(not run.baseline for run in x.runs) > 1]


def _checks(run: ReportedRun) -> dict[str, Any]:
    """Coverage, reload check and kernels of one quantized run, in words."""
    coverage, reload, kernels = (run.get(key) or {} for key in ("coverage", "reload", "kernels"))
    layers = coverage.get("layers") or []
    known = [layer for layer in layers if finite(layer.get("relative_error"))]
    worst = max(known, key=lambda layer: layer["relative_error"], default=None)
    outputs = [layer["output_error"] for layer in layers if finite(layer.get("output_error"))]
    share = coverage.get("share")
    # Rounding must not claim that everything was quantized.
    part = "over 99.9%" if share is not None and 0.9995 <= share < 1 else say.percent(share)
    difference, tolerance = reload.get("max_difference"), reload.get("tolerance")
    passed = None if difference is None or tolerance is None else difference <= tolerance
    selected = ", ".join(f"{name} × {n}" for name, n in (kernels.get("selected") or {}).items())
    rounded = dig(kernels, "rounded_inputs", "layers")
    return {
        "title": run.title,
        "share": f"{part} of {say.size(coverage.get('decoder_bytes'))}",
        "layers": str(len(layers)) if layers else DASH,
        "mean_error": say.percent(sum(x["relative_error"] for x in known) / len(known), 2) if known else DASH,
        "output_error": say.percent(sum(outputs) / len(outputs), 2) if outputs else DASH,
        "worst": f"{worst['name']} ({say.percent(worst['relative_error'], 2)})" if worst else DASH,
        "reload": DASH if passed is None else "passed" if passed else "FAILED",
        "difference": say.small(difference),
        "tolerance": say.small(tolerance),
        "tokens": say.count(reload.get("tokens")),
        "kernels": (selected or DASH) + (f"; inputs rounded in {rounded} layers" if rounded else ""),
    }


def _rules(run: Metrics) -> list[tuple[str, str]]:
    """The recipe's rules for single layers: (pattern, what it says)."""
    rules = dig(run, "recipe", "layers")
    return [(str(pattern), str(rule)) for pattern, rule in rules.items()] if isinstance(rules, Mapping) else []


def _deviations(run: ReportedRun) -> list[str]:
    """Layers that were not quantized as the recipe says, and why."""
    layers = run.get("coverage", "layers") or []
    fallbacks = [f"{x['name']} fell back to absmax: {x['fallback']}" for x in layers if x.get("fallback")]
    return fallbacks + [f"{x['name']}: {x['note']}" for x in layers if x.get("note")]


def _kept(run: Metrics) -> list[tuple[str, str, str, str]]:
    """(name, count, bytes, reason) of what was not quantized, the largest first; all blocks share one line."""
    groups: dict[tuple[str, str], list[Metrics]] = {}
    for tensor in dig(run, "coverage", "kept") or []:
        name = str(tensor.get("name"))
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        reason = str(tensor.get("reason") or DASH).replace(name, pattern)
        groups.setdefault((pattern, reason), []).append(tensor)
    rows = []
    for (pattern, reason), own in groups.items():
        total = sum(tensor.get("bytes") or 0 for tensor in own)
        rows.append((-total, str(own[0].get("name")) if len(own) == 1 else pattern, len(own), reason))
    return [(name, f"{count:,}", say.size(-total), reason) for total, name, count, reason in sorted(rows)]


def _figures(runs: Sequence[ReportedRun], ident: str) -> list[tuple[str, Markup, bool]]:
    from .figures import model_figures

    drawn = enumerate(model_figures(runs, points_of(runs)))
    return [(caption, Markup(drawing.svg(f"{ident}-{number}")), drawing.large) for number, (caption, drawing) in drawn]
