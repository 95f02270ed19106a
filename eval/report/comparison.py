"""Any number of runs side by side: what each costs, which are on the Pareto front, which differ, which to choose.

Divergences (KL, from the unquantized model) compare within one model only, so every model has a section of its own.
Two runs are told apart by a paired test: both read the same windows of text, so the standard error is that of the
differences window by window, in which the text's own spread cancels.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from ..measure.statistics import ratio_and_error
from .candidates import Candidate, Difference
from .recommend import Budget, Choice, choices
from .runs import MACHINE, Entry, Metrics, SpeedPoint, entries_of, finite, points_of

CONTEXT = 4096  # tokens of cache that memory is counted with
_PROTOCOL = (("name", "protocol"), ("text", "text"), ("text_sha256", "hash of the text"), ("context", "context"))


class Incomparable(ValueError):
    """Runs whose figures must not stand side by side; the message says which, and why."""


@dataclass(frozen=True)
class Section:
    """The runs of one model, the baseline first, and what follows from them."""

    model: str
    windows: int
    context: int
    load: str
    runs: list[Candidate]
    differences: list[Difference]
    choices: list[Choice]
    notes: list[str]
    entries: list[Entry]


def compare(runs: Sequence[Metrics], budgets: Sequence[Budget] = (), context: int = CONTEXT) -> list[Section]:
    """One section for each model.

    Args:
        runs: metrics.json of each; baselines among them or not, one of each model is kept.
        budgets: of memory; graphics cards where none is given.
        context: tokens that the cache should hold, cut to what the model can.
    Raises:
        Incomparable: different protocols or texts.
    """
    entries = entries_of(runs)
    _same_protocol(entries)
    models = dict.fromkeys(entry.model for entry in entries)
    return [_section([e for e in entries if e.model == model], budgets, context) for model in models]


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of the points that no other beats: none is lower in one coordinate and not higher in the other."""
    return [
        name for name, (x, y) in points.items()
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())
    ]  # fmt: skip


def between(differences: Sequence[Difference], run: str, other: str) -> Difference | None:
    """The difference of two runs, in this order."""
    for found in differences:
        if (found.run, found.other) == (run, other):
            return found
        if (found.run, found.other) == (other, run):
            return Difference(run, other, -found.difference, found.standard_error)
    return None


def _section(entries: Sequence[Entry], budgets: Sequence[Budget], context: int) -> Section:
    entries = _named_once(entries)
    _same_protocol(entries, (*_PROTOCOL, ("dtype", "dtype")))
    windows = _common_windows(entries)
    context = min(context, _longest(entries) or context)
    speeds = [entry for entry in entries if entry.get("speed")]
    point, load = _common_load(speeds)
    apart = len({repr([entry.get("machine", key) for key in MACHINE]) for entry in speeds}) > 1
    runs = [_candidate(entry, windows, context, None if apart else point) for entry in entries]
    differences = _differences(entries, runs, windows)
    notes = []
    if not any(entry.is_baseline for entry in entries):
        notes.append("No baseline among the runs: what the unquantized model needs is not shown.")
    if apart:
        notes.append("The runs were measured on different machines: their speeds do not compare and are left out.")
    elif speeds and point is None:
        notes.append("The runs were timed at no common load: their speeds are left out.")
    counts = {len(entry.get("quality", "windows", "tokens") or []) for entry in entries}
    if len(counts) > 1:
        notes.append(f"The runs read different numbers of windows: KL and its differences are of the {windows} common.")
    runs = _ranked(runs, differences)
    chosen = choices(runs, lambda a, b: _differ(differences, a, b), budgets)
    return Section(entries[0].model, windows, context, load, runs, differences, chosen, notes, entries)


def _differ(differences: Sequence[Difference], run: str, other: str) -> bool:
    found = between(differences, run, other)
    return found is None or found.differ is not False


def _ranked(runs: Sequence[Candidate], differences: Sequence[Difference]) -> list[Candidate]:
    """The same runs, each with the fronts it is on and the next better one."""
    by_size = {r.run: (r.file_bytes, r.kl_mean) for r in runs if r.file_bytes is not None and r.kl_mean is not None}
    by_speed = {r.run: (-r.decode[0], r.kl_mean) for r in runs if r.decode is not None and r.kl_mean is not None}
    fronts = {"size": set(front(by_size)), "speed": set(front(by_speed))}
    order = sorted((r.kl_mean, r.run) for r in runs if r.kl_mean is not None and not r.baseline)
    better = {run: other for (_, other), (_, run) in pairwise(order)}
    return [
        replace(
            run,
            fronts=[name for name, members in fronts.items() if run.run in members],
            next_better=between(differences, run.run, better.get(run.run, "")),
        )
        for run in runs
    ]


def _candidate(entry: Entry, windows: int, context: int, point: SpeedPoint | None) -> Candidate:
    sums, counts = _sums(entry, windows)
    kl, error = entry.get("quality", "kl_mean"), entry.get("quality", "kl_mean_se")
    if sums is not None and windows:
        kl, error = ratio_and_error(sums, counts)
    if entry.is_baseline:
        kl, error = 0.0, 0.0
    judged = [] if entry.get("gates", "overridden") else entry.get("gates", "judged") or []
    return Candidate(
        run=entry.label,
        baseline=entry.is_baseline,
        scheme=str(entry.get("scheme")),
        method=entry.get("method"),
        format=entry.get("format"),
        file_bytes=_number(entry.get("size", "file_bytes")),
        memory_bytes=_memory(entry, context),
        bits_per_weight=_number(entry.get("size", "bits_per_weight", "decoder")),
        kl_mean=_number(kl),
        kl_mean_se=_number(error),
        perplexity=_number(entry.get("quality", "perplexity")),
        top1_agreement=1.0 if entry.is_baseline else _number(entry.get("quality", "top1_agreement")),
        decode=entry.speed(point, "decode") if point else None,
        missed_gates=[str(gate["gate"]) for gate in judged if not gate["passed"]],
    )


def _memory(entry: Entry, context: int) -> float | None:
    """Bytes of the weights and, where they were measured, of a cache of `context` tokens and of reading as many."""
    found = entry.get("memory") or {}
    weights = found.get("resident_bytes") or entry.get("size", "file_bytes")
    if weights is None:
        return None
    activations = (found.get("activation_peak_bytes") or 0) / max(1, found.get("prompt") or 1)
    return weights + context * ((found.get("kv_cache_bytes_per_token") or 0) + activations)


def _longest(entries: Sequence[Entry]) -> int | None:
    """What fits on the largest card, which is all that the model can hold unless its cache is enormous."""
    fits = [fit.get("context") or 0 for entry in entries for fit in entry.get("memory", "fits") or []]
    return max(fits, default=0) or None


def _common_load(entries: Sequence[Entry]) -> tuple[SpeedPoint | None, str]:
    """The smallest load at which all of these were timed, and its name."""
    points = points_of(entries)
    shared = [p for p in points if all(entry.speed(p, "decode") for entry in entries)]
    return (min(shared), points[min(shared)]) if shared else (None, "")


def _common_windows(entries: Sequence[Entry]) -> int:
    """How many windows all compared runs read; 0 where they do not tell.

    Raises:
        Incomparable: windows of the same number hold different counts of tokens.
    """
    counts = {e.label: e.get("quality", "windows", "tokens") for e in entries if e.get("quality", "windows", "kl")}
    if not counts:
        return 0
    common = min(map(len, counts.values()))
    first, *others = counts
    for other in others:
        if counts[first][:common] != counts[other][:common]:
            raise Incomparable(f"{first} and {other} read different windows of the text; measure both on the same")
    return common


def _sums(entry: Entry, windows: int) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Of each common window the summed KL (of a baseline 0; None where it was not kept) and the number of tokens."""
    kept = entry.get("quality", "windows") or {}
    counts = torch.tensor((kept.get("tokens") or [])[:windows], dtype=torch.float64)
    if entry.is_baseline:
        return torch.zeros_like(counts), counts
    return torch.tensor(kept["kl"][:windows], dtype=torch.float64) if kept.get("kl") else None, counts


def _differences(entries: Sequence[Entry], runs: Sequence[Candidate], windows: int) -> list[Difference]:
    """Of every two quantized runs, the worse first."""
    if not windows:
        return []
    kept: dict[str, torch.Tensor] = {}
    for entry in entries:
        sums, counts = _sums(entry, windows)
        if sums is not None and not entry.is_baseline:
            kept[entry.label], tokens = sums, counts  # the same tokens for all: see _common_windows
    order = sorted((r.kl_mean, r.run) for r in runs if r.run in kept)
    found = []
    for place, (_, other) in enumerate(order):
        for _, run in order[place + 1 :]:
            found.append(Difference(run, other, *ratio_and_error(kept[run] - kept[other], tokens)))
    return found


def _named_once(entries: Sequence[Entry]) -> list[Entry]:
    """One baseline, and no name twice."""
    kept = [*[e for e in entries if e.is_baseline][:1], *[e for e in entries if not e.is_baseline]]
    seen: Counter[str] = Counter()
    named = []
    for entry in kept:
        name = "baseline" if entry.is_baseline else entry.label
        seen[name] += 1
        name = name if seen[name] == 1 else f"{name} ({seen[name]})"
        title = name if entry.title == entry.label else f"{entry.model} · {name}"
        named.append(replace(entry, label=name, title=title))
    return named


def _same_protocol(entries: Sequence[Entry], keys: Sequence[tuple[str, str]] = _PROTOCOL) -> None:
    first = entries[0]
    for entry in entries[1:]:
        for key, name in keys:
            one, other = first.get("protocol", key), entry.get("protocol", key)
            if one != other:
                raise Incomparable(
                    f"{first.title} was measured with the {name} {one} and {entry.title} with {other}: "
                    "their figures do not compare; give runs of one protocol and text"
                )


def _number(value: Any) -> float | None:
    return value if finite(value) and not isinstance(value, bool) and not math.isnan(value) else None
