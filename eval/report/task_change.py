"""The change of a task's score from the baseline's."""

from collections.abc import Mapping
from typing import Any

import torch

from ..measure.statistics import ratio_and_error


def difference(line: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float | None] | None:
    """How much more one model scores than another on the same documents, and the standard error of the difference.

    The error is paired: what makes a document hard for both models cancels.

    Args:
        line, other: from the list that measure.tasks.run_tasks returns.
    Returns:
        None where the documents are not known to be the same.
    """
    own, theirs = line.get("scores"), other.get("scores")
    same = all(line.get(key) == other.get(key) for key in ("task", "metric", "filter", "version"))
    if not own or not theirs or not same or len(own) != len(theirs):
        return None
    changes = torch.tensor(own, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64)
    return ratio_and_error(changes, torch.ones_like(changes))
