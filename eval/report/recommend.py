"""Which run to choose for a given amount of memory, and why in one sentence."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from ..measure import memory
from . import words as say

if TYPE_CHECKING:
    from .candidates import Candidate

CARDS = (4, 6, *memory.CARDS)  # GiB
_WORTH = 1.05  # times as fast: less is not worth a word
Differ = Callable[[str, str], bool]


@dataclass(frozen=True)
class Budget:
    """Memory for one model: weights, cache and activations."""

    name: str
    bytes: float


@dataclass(frozen=True)
class Choice:
    """What to choose for a budget, or for all from one to another where they have the same answer."""

    budget: str
    bytes: float
    run: str | None
    why: str


def choices(runs: Sequence["Candidate"], differ: Differ, budgets: Sequence[Budget] = ()) -> list[Choice]:
    """For each budget the run of least KL that fits; of those that do not differ from it, the smallest.

    Args:
        differ: whether the KL of two runs differs by more than chance.
        budgets: where none is given, graphics cards; or, for a model that fits any of them, the steps at which the
            answer changes.
    """
    known = [run for run in runs if run.kl_mean is not None and run.memory_bytes is not None]
    if not any(not run.baseline for run in known):
        return []
    if budgets:
        return [_choose(budget, known, differ) for budget in sorted(budgets, key=lambda budget: budget.bytes)]
    room = [Budget(f"{card} GB", card * (1 << 30) - memory.RESERVE) for card in CARDS]
    steps = max(map(_need, known)) <= room[0].bytes
    if steps:
        needs = sorted({_need(run) for run in known if not run.missed_gates})
        room = [Budget(f"{say.size(need)} or more", need) for need in needs]
    merged = []
    for _, same in groupby((_choose(budget, known, differ) for budget in room), key=lambda choice: choice.run):
        first, *others = same
        name = f"{first.budget} to {others[-1].budget} cards" if others else f"{first.budget} card"
        merged.append(first if steps else replace(first, budget=name))
    return merged


def _choose(budget: Budget, runs: Sequence["Candidate"], differ: Differ) -> Choice:
    passing = [run for run in runs if not run.missed_gates]
    fitting = [run for run in passing if _need(run) <= budget.bytes]
    if not fitting:
        return Choice(budget.name, budget.bytes, None, _nothing(passing, budget))
    best = min(fitting, key=lambda run: (_kl(run), _need(run), run.run))
    equal = [run for run in fitting if run is best or not (run.baseline or best.baseline or differ(run.run, best.run))]
    chosen = min(equal, key=lambda run: (_need(run), _kl(run), run.run))
    why = [_merit(chosen, best)]
    if better := [run for run in passing if _kl(run) < _kl(best)]:
        following = min(better, key=_need)
        why.append(f"{following.run} would be closer, but needs {say.size(following.memory_bytes)}")
    if faster := _faster(fitting, chosen):
        why.append(
            f"for speed, {faster.run} decodes {_times(faster, chosen)} as fast at a KL of {say.small(faster.kl_mean)}"
        )
    return Choice(budget.name, budget.bytes, chosen.run, "; ".join(why))


def _merit(chosen: "Candidate", best: "Candidate") -> str:
    need = say.size(chosen.memory_bytes)
    if chosen.baseline:
        return f"it fits unquantized ({need}), and nothing is lost"
    if chosen is best:
        divergence = say.divergence(chosen.kl_mean, chosen.kl_mean_se)
        return f"it has the least KL of what fits, {divergence}, in {need}"
    return f"its KL does not differ from that of {best.run}, the least of what fits, and it is smaller ({need})"


def _nothing(passing: Sequence["Candidate"], budget: Budget) -> str:
    if not passing:
        return "none passes its gates"
    least = min(passing, key=_need)
    return f"the smallest, {least.run}, needs {say.size(least.memory_bytes)}"


def _faster(fitting: Sequence["Candidate"], chosen: "Candidate") -> "Candidate | None":
    """The closest of those whose slowest repeat beats the fastest of the chosen, and whose median does by a bit."""
    if not chosen.decode:
        return None
    median, _, highest = chosen.decode
    clearly = [run for run in fitting if run.decode and run.decode[1] > highest and run.decode[0] > _WORTH * median]
    return min(clearly, key=lambda run: (_kl(run), run.run), default=None)


def _times(run: "Candidate", other: "Candidate") -> str:
    assert run.decode
    assert other.decode
    return say.ratio(say.over(run.decode[0], other.decode[0]))


def _need(run: "Candidate") -> float:
    assert run.memory_bytes is not None
    return run.memory_bytes


def _kl(run: "Candidate") -> float:
    assert run.kl_mean is not None
    return run.kl_mean
