"""The report's tables besides the summary: how sure the figures are, gates, errors, tasks, memory, speed, recipes.

Each is (title, header, rows, note). A table of something that no run measured is left out.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from ..measure.memory import LENGTHS, cache_size
from . import words as say
from .runs import ReportedRun, SpeedPoint
from .task_change import difference
from .why_slower import why_slower

Table = tuple[str, list[str], list[list[str]], str]
_WORST = 3  # layers of each run


_GATES: dict[str, tuple[str, Callable[[float | None], str]]] = {
    "kl_mean": ("mean KL", say.small),
    "ppl_increase": ("increase of perplexity", say.percent),
    "top1": ("same next token", say.percent),
    "fallback_layers": ("layers that fell back", say.count),
}


def tables(runs: Sequence[ReportedRun], points: Mapping[SpeedPoint, str]) -> list[Table]:
    """All tables of measurements that a report of these runs has."""
    every = (
        _divergence(runs),
        _gates(runs),
        _errors(runs),
        _tuned(runs),
        _distilled(runs),
        _transformed(runs),
        _inputs_alone(runs),
        _tasks(runs),
        _memory(runs),
        _long_contexts(runs),
        _speed(runs, points),
    )
    budgets = [
        table
        for run in runs
        if (chosen := run.get("budget"))
        for table in budget_tables(f"{run.title}: ", chosen, run.get("quality", "kl_mean"))
    ]
    return [table for table in (*every, *budgets) if table[2]]


def budget_tables(prefix: str, chosen: Mapping[str, Any], measured: float | None = None) -> list[Table]:
    """The curve of KL against size that a budget chose on, and its choice for each unit of layers.

    Args:
        prefix: of the titles. chosen: the "budget" of a metrics.json. measured: the mean KL on the text of the report.
    """
    points = [
        [f"{point['bits']:.3f}", say.size(point["nbytes"]), f"{point['predicted_kl']:.5f}", _mark(point, chosen)]
        for point in chosen["curve"]
    ]
    points += [
        [f"{each['bits']:.3f}", say.size(each.get("nbytes")), f"{each['predicted_kl']:.5f}", _everywhere(each, chosen)]
        for each in chosen["uniform"]
    ]
    note = (
        "Bits are per weight of the layers that have a choice, sizes those of the whole artifact, rounded up. The "
        f"predicted KL is the sum of what each unit alone costs on {chosen['tokens']:,} calibration tokens, in nats. "
        f"For the choice {chosen['predicted_kl']:.5f} is predicted"
    )
    if (together := chosen.get("solutions_kl")) is not None:  # records of before have no such figure
        note += f"; all its solutions together measure {together:.5f} on them"
    note += "."
    if "measured_kl" in chosen:
        note += f" The finished artifact measures {chosen['measured_kl']:.5f} on them"
        note += f", and {measured:.5f} on the text of this report." if measured is not None else "."
    units = [
        [unit["name"], unit["choice"], f"{unit['bits']:.3f}", f"{unit['kl']:.6f}", _costs(unit)]
        for unit in chosen["units"]
    ]
    header = ["unit", "choice", "bits/weight", "KL alone", "KL of every choice"]
    budget = chosen["budget"]
    return [
        (f"{prefix}KL against size", ["bits/weight", "artifact", "predicted KL", ""], sorted(points), note),
        (f"{prefix}choices within {budget}", header, units, "A unit is what servers fuse, and has one scheme."),
    ]


def _mark(point: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    same = all(point.get(key) == chosen[key] for key in ("nbytes", "predicted_kl"))
    return f"chosen within {chosen['budget']}" if same else ""


def _everywhere(uniform: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    """What is said of one choice for all units."""
    said = [f"{uniform['choice']} everywhere", _mark(uniform, chosen)]
    if (measured := uniform.get("solutions_kl")) is not None:
        said.append(f"measures {measured:.5f}")
    return ", ".join(filter(None, said))


def _costs(unit: Mapping[str, Any]) -> str:
    costs = unit.get("costs") or unit["probes"]  # records of before say probes
    return ", ".join(f"{name} {kl:.2g}" for name, kl in costs.items())


def recipe_table(runs: Sequence[ReportedRun]) -> Table:
    """How each run was quantized: one row for each scheme and method among its layers.

    `coverage.layers` has "scheme" and "method" of each layer. Where it does not, those of the run count for all layers.
    """
    rows = []
    for run in runs:
        if run.is_baseline:
            continue
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for layer in run.get("coverage", "layers") or [{}]:
            parts = [layer.get(key) or run.get(key) for key in ("method", "scheme")]
            groups.setdefault("/".join(str(part) for part in parts if part) or say.DASH, []).append(layer)
        for spec, layers in sorted(groups.items(), key=lambda group: (-len(group[1]), group[0])):
            weights = sum(prod(layer.get("shape") or [0]) for layer in layers) or None
            complete = all(layer.get("bytes") is not None for layer in layers)
            size = sum(layer["bytes"] for layer in layers) if complete else None
            row = [
                run.title,
                spec,
                str(run.get("format") or say.DASH),
                say.DASH if layers == [{}] else str(len(layers)),
            ]
            row += [say.count(weights), say.size(size)]
            rows.append([*row, say.number(say.over(None if size is None else 8 * size, weights))])
    note = (
        "Layers, weights and size count the quantized layers of this scheme and method. Size includes scales and zero "
        "points. What was not quantized is listed below with the reason."
    )
    header = ["run", "method/scheme", "format", "layers", "weights", "size", "bits/weight"]
    return "How it was made", header, rows, note


def _divergence(runs: Sequence[ReportedRun]) -> Table:
    header = ["run", "perplexity", "its ratio to the baseline's", "mean KL"]
    kernel = any(run.get("kernels", "rounded_inputs") for run in runs)
    header += ["KL added by the kernel"] * kernel
    header += ["median KL", "99% of tokens below", "largest KL", "top-1 agreement", "RMS change of p", "how"]
    rows = []
    for run in runs:
        quality = run.get("quality") or {}
        if quality.get("perplexity") is None:
            continue
        bound = quality.get("kl_mean_bound")
        how = quality.get("path") or say.DASH
        row = [run.title, say.plus_minus(quality["perplexity"], quality.get("perplexity_se"), say.number)]
        row.append(say.plus_minus(quality.get("perplexity_ratio"), quality.get("perplexity_ratio_se"), say.fine))
        row.append(say.divergence(quality.get("kl_mean"), quality.get("kl_mean_se")))
        rounded = run.get("kernels", "rounded_inputs") or {}
        row += [say.divergence(rounded.get("kl_mean"), rounded.get("kl_mean_se"))] * kernel
        row += [say.small(quality.get(key)) for key in ("kl_median", "kl_p99", "kl_max")]
        row.append(say.plus_minus(quality.get("top1_agreement"), quality.get("top1_agreement_se"), say.hundredths))
        row.append(say.plus_minus(quality.get("rms_dp"), quality.get("rms_dp_se"), say.hundredths))
        row.append(f"{how}; mean KL within {say.small(bound)} of the exact one" if bound else how)
        rows.append(row)
    note = (
        "±: one standard error over windows of text. What compares with the baseline is paired, token by token, so the "
        "ratio of perplexities is known far better than either. p: the probability given to the true next token."
    )
    return "How sure the figures are", header, rows, note


def _errors(runs: Sequence[ReportedRun]) -> Table:
    """The layers whose outputs are furthest off; a run for which they were not measured has no row."""
    rows = []
    for run in runs:
        errors = run.get("output_errors") or {}
        if reason := errors.get("skipped"):
            rows.append([run.title, say.DASH, say.DASH, f"not measured: {reason}"])
        known = [layer for layer in errors.get("layers") or [] if layer.get("output_error") is not None]
        for layer in sorted(known, key=lambda layer: -layer["output_error"])[:_WORST]:
            channels = [f"{x['channel']} ({say.percent(x['share'], 0)})" for x in layer.get("worst_channels") or []]
            error = say.percent(layer["output_error"], 2)
            rows.append([run.title, str(layer.get("name")), error, ", ".join(channels) or say.DASH])
    note = (
        f"The {_WORST} layers of each run whose outputs are furthest off, on the unquantized model's inputs. In "
        "brackets behind a channel is its share of the layer's squared error. All layers are in metrics.json."
    )
    return "Where it hurts most", ["run", "layer", "relative error of outputs", "worst channels"], rows, note


def _tuned(runs: Sequence[ReportedRun]) -> Table:
    """How a block's error fell while a method learned from the whole of it."""
    rows = []
    for run in runs:
        for line in run.get("coverage", "tuned") or []:
            curve = [(int(step), float(error)) for step, error in line["curve"]]
            before, (best, least) = curve[0][1], min(curve, key=lambda point: point[1])
            course = " ".join(f"{error / before:.3f}" if before else say.DASH for _, error in curve)
            change = f"{say.small(before)} → {say.small(least)}"
            rows.append([run.title, str(line["block"]), str(curve[-1][0]), change, str(best), course])
    note = (
        "Error: the squared error of a token's output of the block, as a fraction of the output, on held-out "
        "calibration tokens. The state with the least is kept. Course: the error as a fraction of the first, at equal "
        "distances."
    )
    return "What was learned", ["run", "block", "steps", "error", "kept at step", "course"], rows, note


def _distilled(runs: Sequence[ReportedRun]) -> Table:
    """How the whole model's divergence fell while its scales and norms were trained."""
    rows = []
    for run in runs:
        if not (distilled := run.get("distill")):
            continue
        losses = {int(step): float(loss) for step, loss in distilled["losses"]}
        for step, error in distilled["curve"]:
            loss = losses.get(int(step))
            mark = "kept" if int(step) == distilled["kept_at"] else ""
            rows.append([run.title, str(step), say.small(error), say.DASH if loss is None else say.small(loss), mark])
    note = (
        "Mean KL divergence from the unquantized model: on calibration windows that are held out, of the model as it "
        "is stored, and on those that the steps since the last row learned from. The state with the least held-out "
        "divergence is kept."
    )
    return "What distillation learned", ["run", "steps", "held out", "learned from", ""], rows, note


def _transformed(runs: Sequence[ReportedRun]) -> Table:
    """What a transform did to each group of layers."""
    rows = [
        [run.title, run.get("transform", "name"), ", ".join(group["layers"]), *figures]
        for run in runs
        for group in run.get("transform", "groups") or []
        if (figures := [group["note"], f"{say.small(group['before'])} → {say.small(group['after'])}"])
    ]
    note = (
        "The error is how far rounding these layers alone moves the block's outputs: the squared error as a fraction, "
        "the mean over tokens and that of all tokens together. Groups with no place for a scale are not listed."
    )
    return "What the transform changed", ["run", "transform", "layers", "scale", "error of the block"], rows, note


def _inputs_alone(runs: Sequence[ReportedRun]) -> Table:
    """The layers whose inputs are left alone, and the worst of those whose inputs are rounded."""
    rows = []
    for run in runs:
        units = sorted(run.get("inputs") or [], key=lambda unit: -unit["error"])
        kept, rounded = ([unit for unit in units if unit["kept"] is which] for which in (True, False))
        for unit in (*kept, *rounded[:_WORST]):
            what = "left alone" if unit["kept"] else "rounded"
            rows.append([run.title, ", ".join(unit["layers"]), what, say.small(unit["error"])])
    note = (
        "The error is how far rounding these inputs alone moves the block's outputs, as a fraction of their squares. "
        f"All layers whose inputs are left alone are listed, and of the others the {_WORST} units with the most."
    )
    return "Whose inputs are left alone", ["run", "layers", "inputs", "error of the block"], rows, note


def _gates(runs: Sequence[ReportedRun]) -> Table:
    rows = []
    for run in runs:
        verdict = run.get("gates") or {}
        for gate in sorted(verdict.get("judged") or [], key=lambda gate: gate["passed"]):  # missed gates come first
            name, words = _GATES.get(gate["gate"], (str(gate["gate"]), say.small))
            missed = "missed, overridden" if verdict.get("overridden") else "MISSED"
            asked = f"at {'least' if 'at least' in gate['said'] else 'most'} {words(gate['limit'])}"
            rows.append([run.title, name, words(gate["found"]), asked, "passed" if gate["passed"] else missed])
    return "Gates", ["run", "gate", "measured", "asked for", "verdict"], rows, ""


def _tasks(runs: Sequence[ReportedRun]) -> Table:
    rows = []
    for run in runs:
        others = (run.baseline or {}).get("tasks") or []
        for line in run.get("tasks") or []:
            change = say.DASH
            if compared := next((pair for other in others if (pair := difference(line, other))), None):
                text, error = say.known(*compared)
                signed = text if text.startswith("-") else f"+{text}"
                change = say.followed(signed, f"± {error}" if error else None)
            value = say.plus_minus(line.get("value"), line.get("standard_error"), say.small)
            row = [run.title, str(line.get("task")), str(line.get("metric")), value, change]
            rows.append([*row, say.count(line.get("samples"))])
    note = "±: one standard error. That of a change is paired, document by document, so it is far smaller."
    return "Tasks, by lm-eval", ["run", "task", "metric", "value", "against the baseline", "documents"], rows, note


def _memory(runs: Sequence[ReportedRun]) -> Table:
    header = ["run", "weights", "loading peak", "cache per token", "activations"]
    cards: list[int] = []
    rows = []
    for run in runs:
        memory = run.get("memory") or {}
        fits = {fit["card_gib"]: fit["context"] for fit in memory.get("fits") or []}
        if not fits:
            continue
        cards = cards or list(fits)
        weights, loading, reading = (
            say.size(memory.get(key)) for key in ("resident_bytes", "loading_peak_bytes", "activation_peak_bytes")
        )
        contexts = ["no" if fits.get(card) == 0 else say.count(fits.get(card)) for card in cards]
        rows.append([run.title, weights, loading, say.cache_per_token(memory), reading, *contexts])
    note = (
        "Loading peak: above the memory that the process held before. Activations: the most while a prompt was read. "
        "Under a card's size: the longest context (tokens, batch 1) that fits on it. It is computed from the columns "
        "before, leaves 1 GiB of the card to CUDA and its libraries, and is at most what the model can read."
    )
    return "Memory, and what fits where", header + [f"{card} GiB" for card in cards], rows, note


def _long_contexts(runs: Sequence[ReportedRun]) -> Table:
    rows = []
    for run in runs:
        memory = run.get("memory") or {}
        caches = [(memory, (memory.get("kv_cache") or {}).get("type", "unquantized"))]
        caches += [(memory["kv_cache"], "unquantized")] if memory.get("kv_cache") else []
        for cache, name in caches:
            if (per_token := cache.get("kv_cache_bytes_per_token")) is None:
                continue
            sizes = [cache_size(tokens, per_token, cache.get("kv_cache_windows") or []) for tokens in LENGTHS]
            weights = memory.get("resident_bytes")
            both = None if weights is None else weights + sizes[-1]
            rows.append([run.title, name, say.cache_per_token({**cache, "kv_cache": None}), *map(say.size, sizes)])
            rows[-1].append(say.size(both))
    header = ["run", "cache", "per token", *(f"{tokens:,} tokens" for tokens in LENGTHS)]
    note = (
        "Keys and values of one sequence, by the model's own heads and windows: a layer with a sliding window keeps "
        "the last tokens only. A quantized cache is counted as a runtime keeps it that stores its codes, such as vLLM; "
        "bitpress computes with the rounded numbers, and its own tensors are as large as unquantized ones. The lengths "
        "are computed, whether the model was trained on such or not."
    )
    return "Long contexts", [*header, f"weights and {LENGTHS[-1]:,} tokens"], rows, note


def _speed(runs: Sequence[ReportedRun], points: Mapping[SpeedPoint, str]) -> Table:
    header = ["run", "load", "first token", "decode reads", "of memory's bandwidth", "joules per token"]
    header.append("slower because")
    rows = []
    for run in runs:
        for measured in run.get("speed") or []:
            if "skipped" in measured:
                load = f"batch {measured['batch']}, {measured['prompt']}+{measured['generate']} tokens"
                rows.append([run.title, load, *[say.DASH] * 4, f"not measured: {measured['skipped']}"])
                continue
            point = (measured.get("batch") or 0, measured.get("prompt") or 0, measured.get("generate") or 0)
            if point not in points or "first_token_seconds" not in measured:
                continue
            rate, joules = measured.get("bytes_per_second"), measured.get("joules_per_token") or {}
            reasons = [
                f"{phase}: {why}"
                for phase in ("prefill", "decode")
                if run.speed_against(point, phase)[1] == "slower" and (why := why_slower(run.run, measured, phase))
            ]
            rows.append(
                [
                    run.title,
                    points[point],
                    say.seconds(measured["first_token_seconds"].get("median")),
                    say.DASH if rate is None else f"{say.size(rate)}/s",
                    say.percent(measured.get("bandwidth_share"), 0),
                    " / ".join(say.small(joules.get(phase)) for phase in ("prefill", "decode")) if joules else say.DASH,
                    "; ".join(reasons) or say.DASH,
                ]
            )
    note = (
        "First token: the time from the prompt to it. Decode reads all weights at every step: bytes per second, and "
        "their share of the bandwidth of this machine's memory. Above 100%, a cache of the processor holds them. "
        "Joules: prefill / decode, of the whole processor or card, where the machine can measure them."
    )
    return "Speed, further", header, rows, note
