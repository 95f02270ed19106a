"""Row-wise work spread over threads."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextlib.contextmanager
def pool(workers: int) -> Iterator[Callable[[Callable[[Item], Result], Iterable[Item]], Iterator[Result]]]:
    """A function that starts function(item) for every item, on always the same `workers` threads, which share torch's;
    the results come in order.

    Many short tensor operations run so much better than with all threads on one operation at a time, as each
    operation would end by waiting for its slowest thread. Results do not depend on the number of workers.
    """
    count = torch.get_num_threads()
    share = (max(1, count // workers),)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=share) as executor:
            yield executor.map
    finally:
        torch.set_num_threads(count)  # what a thread sets for itself is also the start of every new thread


def map_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """function of each item, in order; as many items at a time as torch has threads, each on one of them."""
    with pool(torch.get_num_threads()) as run:
        return list(run(function, items))


def one_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """function of each item, in order; one more thread, which leaves torch's to others, is ahead by an item."""
    count = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as executor:
            coming = None
            for item in items:
                following = executor.submit(function, item)
                if coming:
                    yield coming.result()
                coming = following
            if coming:
                yield coming.result()
    finally:
        torch.set_num_threads(count)
