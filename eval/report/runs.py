"""Runs as a page shows them: in order, by model, each beside its baseline.

A run is a metrics.json as a dict. Runs come in any order and may be of several models. The baseline of a model is its
run with the scheme "none", and may be missing. All text in a run counts as hostile: names come from checkpoints.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..measure.statistics import finite
from . import words as say

Metrics = Mapping[str, Any]
BASELINE = "none"  # the scheme of an unquantized model
MACHINE = ("cpu", "cores", "device", "threads")  # speeds compare only where these are the same
SpeedPoint = tuple[int, int, int]  # batch, prompt tokens, generated tokens


@dataclass(frozen=True)
class ReportedRun:
    """One run, its names on a page, and the baseline beside which it stands.

    model: the model's title. label: the recipe's name, or the scheme where there is no recipe; longer where one model
    has it twice. title: the label, after the model's title where a page shows several models. run: its metrics.json.
    baseline: metrics of the baseline; None for the baseline itself, and where there is none.
    """

    model: str
    label: str
    title: str
    run: Metrics
    baseline: Metrics | None

    @property
    def is_baseline(self) -> bool:
        return self.get("scheme") == BASELINE

    @property
    def method_and_format(self) -> str:
        parts = [self.get(key) or say.DASH for key in ("method", "format")]
        return say.DASH if parts == [say.DASH, say.DASH] else "/".join(parts)

    @property
    def sample(self) -> tuple[str, str] | None:
        """The prompt and the text after it."""
        prompt, text = self.get("sample", "prompt"), self.get("sample", "text")
        return None if prompt is None or text is None else (prompt, text.removeprefix(prompt))

    def get(self, *path: str) -> Any:
        return dig(self.run, *path)

    def perplexities(self) -> tuple[float | None, float | None]:
        """The perplexities of the run and of its baseline: on the same tokens, by the same process where it was."""
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
        machines = [[dig(run, "machine", key) for key in MACHINE] for run in (self.run, self.baseline)]
        if new is None or old is None or not old[0] or machines[0] != machines[1]:
            return None, "same"
        overlap = new[1] <= old[2] and old[1] <= new[2]
        return new[0] / old[0], "same" if overlap else "faster" if new[0] > old[0] else "slower"


def reported_runs(runs: Sequence[Metrics]) -> list[ReportedRun]:
    """The runs in the report's order: by model, the baseline first, then from many bits to few."""
    by_model = _by_model(say.printable(runs))
    reported = []
    for model, own in sorted(by_model.items()):
        baseline = next((run for run in own if run.get("scheme") == BASELINE), None)
        names = [_name(run) for run in own]
        ranked = []
        for (label, more), run in zip(names, own, strict=True):
            if external := dig(run, "checkpoint", "id"):
                label = f"{label} {external}"
            elif names.count((label, more)) > 1:
                label = " ".join([label, *(str(run[key]) for key in more if run.get(key))])
            bits = dig(run, "size", "bits_per_weight", "quantized") or 0.0
            ranked.append((run.get("scheme") != BASELINE, -bits, label, run))
        for _, _, label, run in sorted(ranked, key=lambda rank: rank[:3]):
            title = label if len(by_model) == 1 else f"{model} · {label}"
            reported.append(ReportedRun(model, label, title, run, None if run.get("scheme") == BASELINE else baseline))
    return reported


def _name(run: Metrics) -> tuple[str, tuple[str, ...]]:
    """The name of a run, and the keys of its metrics.json that tell runs of this name apart."""
    if run.get("scheme") == BASELINE:
        return "baseline", ("name",)
    recipe = dig(run, "recipe", "name")
    if isinstance(recipe, str) and recipe:
        return recipe, ("name",)
    return str(run.get("scheme")), ("method", "name")  # an older run, or an external checkpoint


def _by_model(runs: Iterable[Metrics]) -> dict[str, list[Metrics]]:
    """The runs of each model, by the model's title.

    `model.identity`, a hash of the model itself, decides where two runs have it. Older runs have none. They are of one
    model where id and revision are the same, and where the count of parameters and the size of the baseline do not
    contradict each other. A run that fits several models is put to none of them.
    """
    stated: dict[tuple[Any, ...], list[Metrics]] = {}
    for run in runs:
        size = dig(run, "size", "file_bytes") if run.get("scheme") == BASELINE else None
        facts = (*(dig(run, "model", key) for key in ("identity", "id", "revision", "parameters")), size)
        stated.setdefault(facts, []).append(run)

    def same_model(one: Sequence[Any], other: Sequence[Any]) -> bool:
        if one[0] is not None and other[0] is not None:
            return one[0] == other[0]
        return tuple(one[1:3]) == tuple(other[1:3]) and all(
            a == b for a, b in zip(one[3:], other[3:]) if None not in (a, b)
        )

    models: list[tuple[list[Any], list[Metrics]]] = []
    for facts in sorted(stated, key=lambda facts: (facts.count(None), repr(facts))):  # those that state most come first
        matches = [model for model in models if same_model(model[0], facts)]
        if len(matches) == 1:
            known, own = matches[0]
            known[:] = [fact if value is None else value for value, fact in zip(known, facts)]
            own += stated[facts]
        else:
            models.append((list(facts), list(stated[facts])))

    titled: dict[str, list[Metrics]] = {}
    for (identity, name, revision, parameters, _), own in models:
        others = [known for known, _ in models if known[1] == name]
        title = str(name)
        if revision is not None and any(known[2] != revision for known in others):
            title += f"@{str(revision)[:8]}"
        if finite(parameters) and any(known[2] == revision and known[3] != parameters for known in others):
            title += f" ({parameters:,} parameters)"
        elif identity is not None and sum(known[2:4] == [revision, parameters] for known in others) > 1:
            title += f" ({str(identity)[:8]})"
        number, plain = 1, title
        while title in titled:  # two models that no fact tells apart
            number += 1
            title = f"{plain} ({number})"
        titled[title] = own
    return titled


def _speeds(run: Metrics | None, phase: str) -> dict[SpeedPoint, tuple[float, float, float]]:
    speeds = {}
    for measured in dig(run, "speed") or []:
        batch, prompt, generate = (measured.get(key) or 0 for key in ("batch", "prompt", "generate"))
        if (median := dig(measured, phase, "median")) is not None:
            low, high = (dig(measured, phase, key) for key in ("min", "max"))
            spread = median if low is None else low, median if high is None else high
            speeds[batch, prompt, generate] = (median, *spread)
    return speeds


def points_of(runs: Iterable[ReportedRun]) -> dict[SpeedPoint, str]:
    """The measured points by name: the batch, and the lengths where one batch was measured at several lengths."""
    points = sorted({p for run in runs for phase in ("prefill", "decode") for p in _speeds(run.run, phase)})
    batches = Counter(batch for batch, _, _ in points)
    return {p: f"batch {p[0]}" + (f", {p[1]}+{p[2]} tokens" if batches[p[0]] > 1 else "") for p in points}


def distinct(runs: Sequence[ReportedRun], of: Callable[[Metrics], Any]) -> list[tuple[str, Any]]:
    """Each different answer of `of` once, with the titles of the runs that gave it ("" where all runs agree)."""
    answers: dict[str, tuple[list[str], Any]] = {}
    for run in runs:
        answer = of(run.run)
        answers.setdefault(repr(answer), ([], answer))[0].append(run.title)
    return [("" if len(answers) == 1 else ", ".join(titles), answer) for titles, answer in answers.values()]


def circumstances(runs: Sequence[ReportedRun]) -> dict[str, list[tuple[str, Any]]]:
    """Everything that one needs to repeat the measurements of a page."""

    def hashes(run: Metrics) -> list[tuple[str, str]]:
        """The model's identity, and sha256 of files, or of the list of an artifact's files and their hashes."""
        facts = run.get("fingerprint") or {}
        files = [(name, str(value)) for name, value in facts.items() if re.fullmatch("[0-9a-f]{64}", str(value))]
        identity = dig(run, "model", "identity")
        return [("model.identity", str(identity)), *files] if identity else files

    return {
        "protocols": distinct(runs, lambda run: terms_of(run.get("protocol"))),
        "machines": distinct(runs, lambda run: terms_of(run.get("machine"))),
        "versions": distinct(runs, lambda run: terms_of(run.get("versions"))),
        "commands": distinct(runs, lambda run: str(run.get("command") or say.DASH)),
        "configs": distinct(runs, lambda run: json.dumps(run.get("config"), indent=2)),
        "hashes": distinct(runs, hashes),
    }


def terms_of(section: Metrics | None) -> list[tuple[str, str]]:
    """The values of one section of a metrics.json as (term, text); a value that is None is left out."""
    terms = []
    for key, value in (section or {}).items():
        if key.endswith("_bytes"):
            terms.append((key[:-6], say.size(value)))
        elif isinstance(value, bool):
            terms.append((key.replace("_", " "), "yes" if value else "no"))
        elif isinstance(value, str):
            terms.append((key.replace("_", " "), value))
        elif value is not None:
            terms.append((key.replace("_", " "), f"{value:,}" if finite(value) else json.dumps(value)))
    return terms


def dig(data: Any, *path: Any) -> Any:
    """data[path[0]][path[1]]…, or None where a step of the path is absent."""
    for key in path:
        if not isinstance(data, Mapping):
            return None
        data = data.get(key)
    return data
