"""Which run to choose for a given amount of memory, and why in one sentence."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from ..measure import memory
from . import words as say
from .candidates import Candidate

CARDS = (4, 6, *memory.CARDS)  # GiB
_WORTH = 1.05  # a smaller gain in speed is not mentioned
Differ = Callable[[str, str], bool]


@dataclass(frozen=True)
class Budget:
    """Memory for one model: weights, cache and activations."""

    name: str
    bytes: float


@dataclass(frozen=True)
class Choice:
    """The run to choose for a budget, or for a range of budgets with the same answer. run: None where nothing fits."""

    budget: str
    bytes: float
    run: str | None
    why: str


def choices(runs: Sequence[Candidate], differ: Differ, budgets: Sequence[Budget] = ()) -> list[Choice]:
    """For each budget the run of least KL that fits; of those that do not differ from it, the smallest.

    Args:
        differ: whether the KL of two runs differs by more than chance.
        budgets: by default graphics cards; or, for a model that fits on any card, the steps at which the answer
            changes.
    """
    known = [run for run in runs if run.kl_mean is not None and run.memory_bytes is not None]
    if all(run.baseline for run in known):
        return []
    if budgets:
        return [_choose(budget, known, differ) for budget in sorted(budgets, key=lambda budget: budget.bytes)]
    steps = [Budget(f"{card} GB", card * (1 << 30) - memory.RESERVE) for card in CARDS]
    fits_anywhere = max(map(_need, known)) <= steps[0].bytes
    if fits_anywhere:
        # needs that a reader cannot tell apart are one step, the largest of them
        needs = {say.size(need): need for need in sorted(_need(run) for run in known if not run.missed_gates)}
        steps = [Budget(f"{size} or more", need) for size, need in needs.items()]
    merged = []
    for _, same in groupby((_choose(budget, known, differ) for budget in steps), key=lambda choice: choice.run):
        first, *others = same
        name = f"{first.budget} to {others[-1].budget} cards" if others else f"{first.budget} card"
        merged.append(first if fits_anywhere else replace(first, budget=name))
    return merged


def _choose(budget: Budget, runs: Sequence[Candidate], differ: Differ) -> Choice:
    passing = [run for run in runs if not run.missed_gates]
    if not passing:
        return Choice(budget.name, budget.bytes, None, "none passes its gates")
    fitting = [run for run in passing if _need(run) <= budget.bytes]
    if not fitting:
        least = min(passing, key=_need)
        why = f"the smallest, {least.run}, needs {say.size(least.memory_bytes)}"
        return Choice(budget.name, budget.bytes, None, why)
    best = min(fitting, key=lambda run: (_kl(run), _need(run), run.run))
    equal = [run for run in fitting if run is best or not (run.baseline or best.baseline or differ(run.run, best.run))]
    chosen = min(equal, key=lambda run: (_need(run), _kl(run), run.run))

    need = say.size(chosen.memory_bytes)
    if chosen.baseline:
        reasons = [f"it fits unquantized ({need}), and nothing is lost"]
    elif chosen is best:
        divergence = say.divergence(chosen.kl_mean, chosen.kl_mean_se)
        reasons = [f"it has the least KL of what fits, {divergence}, in {need}"]
    else:
        alike = f"its KL does not differ from that of {best.run}, the least of what fits"
        reasons = [f"{alike}, and it is smaller ({need})"]
    if better := [run for run in passing if _kl(run) < _kl(best)]:
        following = min(better, key=_need)
        reasons.append(f"{following.run} would be closer, but needs {say.size(following.memory_bytes)}")
    if chosen.decode:
        # Faster means: the slowest repeat beats the fastest one of the chosen run, and the median is clearly higher.
        median, _, highest = chosen.decode
        speeds = [(run, run.decode) for run in fitting if run.decode]
        faster = [(run, own) for run, own in speeds if own[1] > highest and own[0] > _WORTH * median]
        if faster:
            run, own = min(faster, key=lambda pair: (_kl(pair[0]), pair[0].run))
            times = say.ratio(say.over(own[0], median))
            reasons.append(f"for speed, {run.run} decodes {times} as fast at a KL of {say.small(run.kl_mean)}")
    return Choice(budget.name, budget.bytes, chosen.run, "; ".join(reasons))


def _need(run: Candidate) -> float:
    assert run.memory_bytes is not None
    return run.memory_bytes


def _kl(run: Candidate) -> float:
    assert run.kl_mean is not None
    return run.kl_mean
