"""How far a task's score moved from the baseline's."""

from collections.abc import Mapping
from typing import Any

import torch

from ..measure.statistics import ratio_and_error


def difference(line: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float | None] | None:
    """How much more one model scores than another on the same documents, and the standard error of that: what makes a
    document hard for both cancels. None where their documents are not known to be the same.

    Args:
        line, other: of run_tasks.
    """
    ours, theirs = line.get("scores"), other.get("scores")
    same = all(line.get(key) == other.get(key) for key in ("task", "metric", "filter", "version"))
    if not ours or not theirs or not same or len(ours) != len(theirs):
        return None
    changes = torch.tensor(ours, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64)
    return ratio_and_error(changes, torch.ones_like(changes))
