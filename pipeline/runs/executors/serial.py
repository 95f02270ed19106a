"""One job after the other, in this process."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar

from .base import Executor

if TYPE_CHECKING:
    from ..job import Job, Outcome


class Serial(Executor):
    """Runs each job when the one before it has ended."""

    name: ClassVar[str] = "serial"
    rank: ClassVar[int] = 0

    def map(self, jobs: "Iterable[Job]", say: Callable[[str], None]) -> "Iterator[Outcome]":
        """The outcomes, in the order of the jobs."""
        from ..job import run_job

        return (run_job(job, say) for job in jobs)


PLUGINS = (Serial(),)
