"""Any number of runs side by side: what each costs, which are on the Pareto front, which differ, which to choose.

Divergences (KL, from the unquantized model) compare within one model only, so every model has a section of its own.
Two runs are told apart by a paired test. Both read the same windows of text, so the standard error is that of the
differences window by window, in which the text's own spread cancels.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from ..measure.memory import cache_size
from ..measure.statistics import finite, ratio_and_error
from .candidates import Candidate, Difference
from .recommend import Budget, Choice, choices
from .runs import MACHINE, Metrics, ReportedRun, SpeedPoint, points_of, reported_runs

CONTEXT = 4096  # tokens of cache that memory is counted with
_PROTOCOL = (("name", "protocol"), ("text", "text"), ("text_sha256", "hash of the text"), ("context", "context"))


class Incomparable(ValueError):
    """Runs whose figures must not stand side by side; the message names them and the reason."""


@dataclass(frozen=True)
class Section:
    """The runs of one model, the baseline first, and what follows from their figures.

    windows: how many windows all runs read. context: tokens of the cache that memory is counted with. load: the load at
    which decode speeds compare; "" where there is none. runs: as candidates; reported: as they were measured.
    """

    model: str
    windows: int
    context: int
    load: str
    runs: list[Candidate]
    differences: list[Difference]
    choices: list[Choice]
    notes: list[str]
    reported: list[ReportedRun]


def compare(runs: Sequence[Metrics], budgets: Sequence[Budget] = (), context: int = CONTEXT) -> list[Section]:
    """One section for each model.

    Args:
        runs: the metrics.json of each. Baselines may be among them; one of each model is used.
        budgets: amounts of memory; by default common graphics cards.
        context: tokens that the cache should hold, at most what the model can read.
    Raises:
        Incomparable: different protocols or texts.
    """
    reported = reported_runs(runs)
    _same_protocol(reported, _PROTOCOL)
    models = dict.fromkeys(run.model for run in reported)
    return [_section([run for run in reported if run.model == model], budgets, context) for model in models]


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of the points that no other point beats: lower in one coordinate and not higher in the other."""
    return [
        name for name, (x, y) in points.items()
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())
    ]  # fmt: skip


def between(differences: Sequence[Difference], run: str, other: str) -> Difference | None:
    """The difference of two runs, in this order; None where it is not known."""
    for pair in differences:
        if (pair.run, pair.other) == (run, other):
            return pair
        if (pair.run, pair.other) == (other, run):
            return Difference(run, other, -pair.difference, pair.standard_error)
    return None


def _section(reported: Sequence[ReportedRun], budgets: Sequence[Budget], context: int) -> Section:
    reported = _named_once(reported)
    _same_protocol(reported, (*_PROTOCOL, ("dtype", "dtype")))
    windows = _common_windows(reported)
    # The largest card holds what the model can read at most, unless its cache is enormous.
    readable = max((fit.get("context") or 0 for run in reported for fit in run.get("memory", "fits") or []), default=0)
    context = min(context, readable or context)

    timed = [run for run in reported if run.get("speed")]
    machines = {repr([run.get("machine", key) for key in MACHINE]) for run in timed}
    loads = points_of(timed)
    common = [point for point in loads if all(run.speed(point, "decode") for run in timed)]
    point = min(common, default=None)
    candidates = [_candidate(run, windows, context, point if len(machines) <= 1 else None) for run in reported]

    notes = [f"{run.title}: {warning}." for run in reported for warning in run.get("warnings") or []]
    if not any(run.is_baseline for run in reported):
        notes.append("No baseline among the runs: what the unquantized model needs is not shown.")
    if len(machines) > 1:
        notes.append("The runs were measured on different machines: their speeds do not compare and are left out.")
    elif timed and point is None:
        notes.append("The runs were timed at no common load: their speeds are left out.")
    if len({len(run.get("quality", "windows", "tokens") or []) for run in reported}) > 1:
        notes.append(
            f"The runs read different numbers of windows: KL and its differences are over the {windows} common windows."
        )

    # Every pair of quantized runs, the worse one first.
    differences: list[Difference] = []
    sums = {run.label: kl for run in reported if not run.is_baseline and (kl := _window_sums(run, windows)) is not None}
    order = sorted((c.kl_mean, c.run) for c in candidates if windows and c.run in sums and c.kl_mean is not None)
    for place, (_, other) in enumerate(order):
        for _, run in order[place + 1 :]:
            (worse, tokens), (better, _) = sums[run], sums[other]  # all have the same tokens: see _common_windows
            differences.append(Difference(run, other, *ratio_and_error(worse - better, tokens)))

    by_size = {
        c.run: (c.file_bytes, c.kl_mean) for c in candidates if c.file_bytes is not None and c.kl_mean is not None
    }
    by_speed = {c.run: (-c.decode[0], c.kl_mean) for c in candidates if c.decode and c.kl_mean is not None}
    fronts = {"size": set(front(by_size)), "speed": set(front(by_speed))}
    ranking = sorted((c.kl_mean, c.run) for c in candidates if c.kl_mean is not None and not c.baseline)
    next_better = {run: better for (_, better), (_, run) in pairwise(ranking)}
    candidates = [
        replace(
            candidate,
            fronts=[name for name, members in fronts.items() if candidate.run in members],
            next_better=between(differences, candidate.run, next_better.get(candidate.run, "")),
        )
        for candidate in candidates
    ]

    def differ(run: str, other: str) -> bool:
        pair = between(differences, run, other)
        return pair is None or pair.differ is not False

    chosen = choices(candidates, differ, budgets)
    load = loads[point] if point else ""
    return Section(reported[0].model, windows, context, load, candidates, differences, chosen, notes, list(reported))


def _candidate(run: ReportedRun, windows: int, context: int, point: SpeedPoint | None) -> Candidate:
    def number(value: Any) -> float | None:
        return value if finite(value) and not isinstance(value, bool) else None

    kl, error = run.get("quality", "kl_mean"), run.get("quality", "kl_mean_se")
    if windows and (sums := _window_sums(run, windows)) is not None:
        kl, error = ratio_and_error(*sums)
    if run.is_baseline:
        kl, error = 0.0, 0.0
    # Memory: the weights and, where it was measured, a cache of `context` tokens and the activations of reading them.
    memory = run.get("memory") or {}
    weights = memory.get("resident_bytes") or run.get("size", "file_bytes")
    activations = (memory.get("activation_peak_bytes") or 0) / max(1, memory.get("prompt") or 1)
    cache = cache_size(context, memory.get("kv_cache_bytes_per_token") or 0, memory.get("kv_cache_windows") or [])
    judged = [] if run.get("gates", "overridden") else run.get("gates", "judged") or []
    return Candidate(
        run=run.label,
        baseline=run.is_baseline,
        scheme=str(run.get("scheme")),
        method=run.get("method"),
        format=run.get("format"),
        file_bytes=number(run.get("size", "file_bytes")),
        memory_bytes=None if weights is None else weights + cache + context * activations,
        bits_per_weight=number(run.get("size", "bits_per_weight", "decoder")),
        kl_mean=number(kl),
        kl_mean_se=number(error),
        kernel_kl_mean=number(run.get("kernels", "rounded_inputs", "kl_mean")),
        kernel_kl_mean_se=number(run.get("kernels", "rounded_inputs", "kl_mean_se")),
        perplexity=number(run.get("quality", "perplexity")),
        top1_agreement=1.0 if run.is_baseline else number(run.get("quality", "top1_agreement")),
        decode=run.speed(point, "decode") if point else None,
        missed_gates=[str(gate["gate"]) for gate in judged if not gate["passed"]],
    )


def _common_windows(reported: Sequence[ReportedRun]) -> int:
    """How many windows all compared runs read; 0 where the runs have no figures by window.

    Raises:
        Incomparable: windows of the same number hold different counts of tokens.
    """
    counts = {r.label: r.get("quality", "windows", "tokens") for r in reported if r.get("quality", "windows", "kl")}
    if not counts:
        return 0
    common = min(map(len, counts.values()))
    first, *others = counts
    for other in others:
        if counts[first][:common] != counts[other][:common]:
            raise Incomparable(f"{first} and {other} read different windows of the text; measure both on the same")
    return common


def _window_sums(run: ReportedRun, windows: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The summed KL and the number of tokens of each common window, float64; None where the run has no such sums."""
    by_window = run.get("quality", "windows") or {}
    if not by_window.get("kl"):
        return None
    kl, tokens = (torch.tensor(by_window[key][:windows], dtype=torch.float64) for key in ("kl", "tokens"))
    return kl, tokens


def _named_once(reported: Sequence[ReportedRun]) -> list[ReportedRun]:
    """One baseline and all quantized runs, each with a label of its own."""
    one_baseline = [run for run in reported if run.is_baseline][:1]
    seen: Counter[str] = Counter()
    named = []
    for run in [*one_baseline, *(run for run in reported if not run.is_baseline)]:
        label = "baseline" if run.is_baseline else run.label
        seen[label] += 1
        label = label if seen[label] == 1 else f"{label} ({seen[label]})"
        title = label if run.title == run.label else f"{run.model} · {label}"
        named.append(replace(run, label=label, title=title))
    return named


def _same_protocol(reported: Sequence[ReportedRun], keys: Sequence[tuple[str, str]]) -> None:
    first = reported[0]
    for run in reported[1:]:
        for key, name in keys:
            one, other = first.get("protocol", key), run.get("protocol", key)
            if one != other:
                raise Incomparable(
                    f"{first.title} was measured with the {name} {one} and {run.title} with {other}: "
                    "their figures do not compare; give runs of one protocol and text"
                )
