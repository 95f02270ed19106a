"""What a tracker is, and what it is told of a job."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Protocol


@dataclass(frozen=True)
class TrackedJob:
    """A finished job, in plain values.

    Attributes:
        run: the config's name, which trackers call project or experiment. job: the model and the recipe.
        settings: what it was done with. figures: what was measured; sizes are bytes, speeds tokens per second.
        files: its report, metrics.json and results.csv. folder: of the run, for trackers that write to the disk.
    """

    run: str
    job: str
    settings: Mapping[str, str]
    figures: Mapping[str, float]
    files: Sequence[Path]
    folder: Path


class Tracker(Protocol):
    """Sends a finished job to where people keep their experiments. Trackers derive from this class.

    The first line of a tracker's docstring is what `bitpress list` says of it. package: what it imports, when it is
    used.
    """

    name: ClassVar[str]
    rank: ClassVar[int]
    package: ClassVar[str]

    def unsupported(self) -> str | None:
        """Why it cannot be used here; None if it can."""
        if find_spec(self.package) is None:
            return f"{self.name} needs the package {self.package}, which is not installed: pip install {self.package}"
        return None

    def send(self, job: TrackedJob) -> str:
        """Send a job; returns where it can be seen."""
        raise NotImplementedError


def plain(name: str) -> str:
    """A name of letters, digits and what all trackers and file systems take."""
    return re.sub(r"[^\w./ -]", "_", name)
