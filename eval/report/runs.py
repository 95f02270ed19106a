"""Runs as a page shows them: in order, by model, each beside its baseline.

A run is a metrics.json as a dict. Runs come in any order and may be of several models; the baseline of a
model is its run with scheme "none" and may be missing. All text in a run is taken for hostile: names come
from checkpoints.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import words as say

Metrics = Mapping[str, Any]
MACHINE = ("cpu", "cores", "device", "threads")  # what must agree for speeds to compare
SpeedPoint = tuple[int, int, int]  # batch, prompt tokens, generated tokens


@dataclass(frozen=True)
class Entry:
    """One run and what it is compared to."""

    model: str
    label: str  # the scheme, with more where one model has it twice
    title: str  # the label, with the model where there are several
    run: Metrics
    baseline: Metrics | None  # None for the baseline itself and where it is absent

    @property
    def is_baseline(self) -> bool:
        return self.get("scheme") == "none"

    @property
    def sample(self) -> tuple[str, str] | None:
        """The prompt and what followed it."""
        prompt, text = self.get("sample", "prompt"), self.get("sample", "text")
        return None if prompt is None or text is None else (prompt, text.removeprefix(prompt))

    def get(self, *path: str) -> Any:
        return dig(self.run, *path)

    def perplexities(self) -> tuple[float | None, float | None]:
        """The run's and the baseline's, the latter from the same process and tokens where the run has it."""
        before = self.get("quality", "baseline_perplexity")
        if before is None and dig(self.baseline, "protocol") == self.get("protocol"):
            before = dig(self.baseline, "quality", "perplexity")
        return self.get("quality", "perplexity"), before

    def size_ratio(self) -> float | None:
        return say.over(self.get("size", "file_bytes"), dig(self.baseline, "size", "file_bytes"))

    def speed(self, point: SpeedPoint, phase: str) -> tuple[float, float, float] | None:
        """Tokens per second: median, lowest and highest."""
        return _speeds(self.run, phase).get(point)

    def speed_against(self, point: SpeedPoint, phase: str) -> tuple[float | None, str]:
        """The ratio to the baseline and "faster", "slower" or "same" (the spreads of the two overlap).

        Speeds of two machines are not compared: (None, "same").
        """
        new, old = self.speed(point, phase), _speeds(self.baseline, phase).get(point)
        where = [[dig(run, "machine", key) for key in MACHINE] for run in (self.run, self.baseline)]
        if new is None or old is None or not old[0] or where[0] != where[1]:
            return None, "same"
        overlap = new[1] <= old[2] and old[1] <= new[2]
        return new[0] / old[0], "same" if overlap else "faster" if new[0] > old[0] else "slower"


def entries_of(runs: Sequence[Metrics]) -> list[Entry]:
    """The runs in the report's order: by model, the baseline first, then from many bits to few."""
    runs = say.printable(runs)
    by_model: dict[str, list[Metrics]] = {}
    ids = {(dig(run, "model", "id"), dig(run, "model", "revision")) for run in runs}
    twice = Counter(name for name, _ in ids)
    for run in runs:
        name, revision = dig(run, "model", "id"), dig(run, "model", "revision")
        title = f"{name}@{str(revision)[:8]}" if twice[name] > 1 else str(name)
        by_model.setdefault(title, []).append(run)
    entries = []
    for model, own in sorted(by_model.items()):
        baseline = next((run for run in own if run.get("scheme") == "none"), None)
        schemes = Counter(run.get("scheme") for run in own)
        labels = [_label(run, schemes[run.get("scheme")] > 1) for run in own]
        for label, run in sorted(zip(labels, own, strict=True), key=_rank):
            title = label if len(by_model) == 1 else f"{model} · {label}"
            entries.append(Entry(model, label, title, run, None if run.get("scheme") == "none" else baseline))
    return entries


def _label(run: Metrics, ambiguous: bool) -> str:
    scheme = "baseline" if run.get("scheme") == "none" else str(run.get("scheme"))
    if where := dig(run, "checkpoint", "id"):
        return f"{scheme} {where}"
    more = (str(run.get(key)) for key in ("method", "name") if ambiguous and run.get(key))
    return " ".join((scheme, *more))


def _rank(labelled: tuple[str, Metrics]) -> tuple[bool, float, str]:
    label, run = labelled
    return run.get("scheme") != "none", -(dig(run, "size", "bits_per_weight", "quantized") or 0.0), label


def _speeds(run: Metrics | None, phase: str) -> dict[SpeedPoint, tuple[float, float, float]]:
    speeds = {}
    for measured in dig(run, "speed") or []:
        batch, prompt, generate = (measured.get(key) or 0 for key in ("batch", "prompt", "generate"))
        if (median := dig(measured, phase, "median")) is not None:
            low, high = (dig(measured, phase, key) for key in ("min", "max"))
            spread = median if low is None else low, median if high is None else high
            speeds[batch, prompt, generate] = (median, *spread)
    return speeds


def points_of(entries: Iterable[Entry]) -> dict[SpeedPoint, str]:
    """The measured points by name: the batch, and the lengths where one batch was measured at several."""
    found = sorted({p for e in entries for phase in ("prefill", "decode") for p in _speeds(e.run, phase)})
    batches = Counter(batch for batch, _, _ in found)
    return {p: f"batch {p[0]}" + (f", {p[1]}+{p[2]} tokens" if batches[p[0]] > 1 else "") for p in found}


def distinct(entries: Sequence[Entry], of: Callable[[Metrics], Any]) -> list[tuple[str, Any]]:
    """What the runs say, each different answer once, with the runs that gave it ("" where all agree)."""
    answers: dict[str, tuple[list[str], Any]] = {}
    for entry in entries:
        answer = of(entry.run)
        answers.setdefault(repr(answer), ([], answer))[0].append(entry.title)
    return [("" if len(answers) == 1 else ", ".join(titles), answer) for titles, answer in answers.values()]


def circumstances(entries: Sequence[Entry]) -> dict[str, list[tuple[str, Any]]]:
    """Everything that it takes to repeat what a page tells."""
    return {
        "protocols": distinct(entries, lambda run: facts_of(run.get("protocol"))),
        "machines": distinct(entries, lambda run: facts_of(run.get("machine"))),
        "versions": distinct(entries, lambda run: facts_of(run.get("versions"))),
        "commands": distinct(entries, lambda run: str(run.get("command") or say.DASH)),
        "configs": distinct(entries, lambda run: json.dumps(run.get("config"), indent=2)),
        "hashes": distinct(entries, _hashes),
    }


def _hashes(run: Metrics) -> list[tuple[str, str]]:
    """sha256 of the files, or of the list of an artifact's files and their hashes."""
    marks = run.get("fingerprint") or {}
    return [(name, str(value)) for name, value in marks.items() if re.fullmatch("[0-9a-f]{64}", str(value))]


def facts_of(facts: Metrics | None) -> list[tuple[str, str]]:
    words = []
    for key, value in (facts or {}).items():
        if key.endswith("_bytes"):
            words.append((key[:-6], say.size(value)))
        elif isinstance(value, bool):
            words.append((key.replace("_", " "), "yes" if value else "no"))
        elif isinstance(value, str):
            words.append((key.replace("_", " "), value))
        elif value is not None:
            words.append((key.replace("_", " "), f"{value:,}" if finite(value) else json.dumps(value)))
    return words


def dig(data: Any, *path: Any) -> Any:
    """data[path[0]][path[1]]…, or None where anything on the way is absent."""
    for key in path:
        if not isinstance(data, Mapping):
            return None
        data = data.get(key)
    return data


def finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
