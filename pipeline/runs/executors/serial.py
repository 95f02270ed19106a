"""One job after the other, in this process."""

from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar

from ..job import Job, Outcome, run_job


class Serial:
    """Runs each job when the one before it has ended."""

    name: ClassVar[str] = "serial"
    rank: ClassVar[int] = 0

    def map(self, jobs: Iterable[Job], say: Callable[[str], None]) -> Iterator[Outcome]:
        """The outcomes, in the order of the jobs."""
        return (run_job(job, say) for job in jobs)


PLUGINS = (Serial(),)
