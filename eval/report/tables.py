"""The report's tables besides the summary: how sure the figures are, what memory and speed come to, tasks, gates.

Each is (title, header, rows, note); one that nothing was measured for is left out.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import words as say
from .task_change import difference
from .why_slower import because

if TYPE_CHECKING:
    from .runs import Entry, SpeedPoint

Table = tuple[str, list[str], list[list[str]], str]
_WORST = 3  # layers of each run


def tables(entries: Sequence["Entry"], points: Mapping["SpeedPoint", str]) -> list[Table]:
    """All tables of a report's runs."""
    made = (_divergence(entries), _gates(entries), _errors(entries), _tasks(entries), _memory(entries))
    return [table for table in (*made, _speed(entries, points)) if table[2]]


def _divergence(entries: Sequence["Entry"]) -> Table:
    header = ["run", "perplexity", "its ratio to the baseline's", "mean KL", "median KL", "99% of tokens below"]
    header += ["largest KL", "top-1 agreement", "RMS change of p", "how"]
    rows = []
    for entry in entries:
        found = entry.get("quality") or {}
        if found.get("perplexity") is None:
            continue
        bound = found.get("kl_mean_bound")
        how = found.get("path") or say.DASH
        row = [entry.title, say.plus_minus(found["perplexity"], found.get("perplexity_se"), say.number)]
        row.append(say.plus_minus(found.get("perplexity_ratio"), found.get("perplexity_ratio_se"), say.fine))
        row.append(say.divergence(found.get("kl_mean"), found.get("kl_mean_se")))
        row += [say.small(found.get(key)) for key in ("kl_median", "kl_p99", "kl_max")]
        row.append(say.plus_minus(found.get("top1_agreement"), found.get("top1_agreement_se"), say.hundredths))
        row.append(say.plus_minus(found.get("rms_dp"), found.get("rms_dp_se"), say.hundredths))
        row.append(f"{how}; mean KL within {say.small(bound)} of the exact one" if bound else how)
        rows.append(row)
    note = (
        "±: one standard error over windows of text. What compares with the baseline is paired, token by token, so the "
        "ratio of perplexities is known far better than either. p: the probability given to the true next token."
    )
    return "How sure the figures are", header, rows, note


def _errors(entries: Sequence["Entry"]) -> Table:
    """The layers whose outputs are furthest off; a run that was not asked for them has no row."""
    rows = []
    for entry in entries:
        errors = entry.get("output_errors") or {}
        if reason := errors.get("skipped"):
            rows.append([entry.title, say.DASH, say.DASH, f"not measured: {reason}"])
        known = [layer for layer in errors.get("layers") or [] if layer.get("output_error") is not None]
        for layer in sorted(known, key=lambda layer: -layer["output_error"])[:_WORST]:
            channels = [f"{x['channel']} ({say.percent(x['share'], 0)})" for x in layer.get("worst_channels") or []]
            error = say.percent(layer["output_error"], 2)
            rows.append([entry.title, str(layer.get("name")), error, ", ".join(channels) or say.DASH])
    note = (
        f"The {_WORST} layers of each run whose outputs are furthest off, on the unquantized model's inputs; "
        "in brackets behind a channel its share in the layer's squared error. All layers are in metrics.json."
    )
    return "Where it hurts most", ["run", "layer", "relative error of outputs", "worst channels"], rows, note


def _gates(entries: Sequence["Entry"]) -> Table:
    rows = []
    for entry in entries:
        verdict = entry.get("gates") or {}
        judged = sorted(verdict.get("judged") or [], key=lambda gate: gate["passed"])  # what was missed comes first
        if judged:
            word = "missed, overridden" if verdict.get("overridden") else "MISSED"
            found = "; ".join(str(gate["said"]) for gate in judged)
            rows.append([entry.title, "passed" if judged[0]["passed"] else word, found])
    return "Gates", ["run", "verdict", "found"], rows, ""


def _tasks(entries: Sequence["Entry"]) -> Table:
    rows = []
    for entry in entries:
        for line in entry.get("tasks") or []:
            value = say.plus_minus(line.get("value"), line.get("standard_error"), say.small)
            row = [entry.title, str(line.get("task")), str(line.get("metric")), value, _change(entry, line)]
            rows.append([*row, say.count(line.get("samples"))])
    note = "±: one standard error; of the change it is paired, document by document, and so far smaller."
    return "Tasks, by lm-eval", ["run", "task", "metric", "value", "against the baseline", "documents"], rows, note


def _change(entry: "Entry", line: Mapping[str, Any]) -> str:
    """The difference to the baseline's score."""
    others = (entry.baseline or {}).get("tasks") or []
    found = next((change for other in others if (change := difference(line, other))), None)
    if found is None:
        return say.DASH
    words, error = say.known(*found)
    return say.followed(words if words.startswith("-") else f"+{words}", f"± {error}" if error else None)


def _memory(entries: Sequence["Entry"]) -> Table:
    header = ["run", "weights", "loading peak", "cache per token", "activations"]
    cards: list[int] = []
    rows = []
    for entry in entries:
        found = entry.get("memory") or {}
        fits = {fit["card_gib"]: fit["context"] for fit in found.get("fits") or []}
        if not fits:
            continue
        cards = cards or list(fits)
        sizes = ("resident_bytes", "loading_peak_bytes", "kv_cache_bytes_per_token", "activation_peak_bytes")
        contexts = ["no" if fits.get(card) == 0 else say.count(fits.get(card)) for card in cards]
        rows.append([entry.title, *(say.size(found.get(key)) for key in sizes), *contexts])
    note = (
        "Loading peak: beside what was there. Activations: the most while a prompt was read. Under a card's size, the "
        "longest context (tokens, batch 1) that fits on it: computed from the columns before, 1 GiB of the card left "
        "to CUDA and its libraries, up to what the model can hold."
    )
    return "Memory, and what fits where", header + [f"{card} GiB" for card in cards], rows, note


def _speed(entries: Sequence["Entry"], points: Mapping["SpeedPoint", str]) -> Table:
    header = [
        "run",
        "load",
        "first token",
        "decode reads",
        "of memory's bandwidth",
        "joules per token",
        "slower because",
    ]
    rows = []
    for entry in entries:
        for measured in entry.get("speed") or []:
            if "skipped" in measured:
                load = f"batch {measured['batch']}, {measured['prompt']}+{measured['generate']} tokens"
                rows.append([entry.title, load, *[say.DASH] * 4, f"not measured: {measured['skipped']}"])
                continue
            point = (measured.get("batch") or 0, measured.get("prompt") or 0, measured.get("generate") or 0)
            if point not in points or "first_token_seconds" not in measured:
                continue
            rate, joules = measured.get("bytes_per_second"), measured.get("joules_per_token") or {}
            spent = [say.small(joules.get(phase)) for phase in ("prefill", "decode")]
            row = [entry.title, points[point], say.seconds(measured["first_token_seconds"].get("median"))]
            row += [
                say.DASH if rate is None else f"{say.size(rate)}/s",
                say.percent(measured.get("bandwidth_share"), 0),
            ]
            row.append(" / ".join(spent) if joules else say.DASH)
            reasons = [
                f"{phase}: {why}"
                for phase in ("prefill", "decode")
                if entry.speed_against(point, phase)[1] == "slower" and (why := because(entry.run, measured, phase))
            ]
            rows.append([*row, "; ".join(reasons) or say.DASH])
    note = (
        "First token: seconds from the prompt to it. Decode reads all weights once a step: bytes per second, and their "
        "share of what this machine's memory gives; above 100%, a cache of the processor holds them. Joules: prefill / "
        "decode, of the whole processor or card, where the machine tells."
    )
    return "Speed, further", header, rows, note
