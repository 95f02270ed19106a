"""What an executor is."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from ..job import Job, Outcome


class Executor(Protocol):
    """Carries out jobs by `run_job`, here or elsewhere: a job is plain values and can be sent to another process.

    The first line of an executor's docstring is what `bitpress list` says of it. Its file imports jobs when it carries
    them out, because they bring torch and transformers.

    An executor with options is a pydantic dataclass, its fields the options.

    Jobs share nothing but the disk, where each holds the lock of its own folder. Their files must be within reach under
    the same paths wherever they run, or the executor sends them.

    packages: names of the packages, beside bitpress's own requirements, that it takes.
    elsewhere: whether jobs may run on other machines, so that the memory of this one says nothing.
    """

    name: ClassVar[str]
    rank: ClassVar[int]
    packages: ClassVar[tuple[str, ...]] = ()

    @property
    def elsewhere(self) -> bool:
        return False

    def map(self, jobs: "Iterable[Job]", say: Callable[[str], None]) -> "Iterator[Outcome]":
        """The outcome of each job as it ends, in any order; the next job is taken from `jobs` when there is room.

        Args:
            say: takes a line of news.
        """
        ...
