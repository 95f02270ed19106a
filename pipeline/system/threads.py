"""Row-wise work spread over threads."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from .device import current

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


def ahead(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """function of each item, in order; `workers` threads are that many items ahead, and no more wait in memory.

    Each of them has as many of torch's threads as this one, so that sums are divided, and results are, as without it.
    """
    count = torch.get_num_threads()
    coming: deque[Future[Result]] = deque()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(count,)) as executor:
            try:
                for item in items:
                    if len(coming) == workers:
                        yield coming.popleft().result()
                    coming.append(executor.submit(function, item))
                while coming:
                    yield coming.popleft().result()
            finally:
                for future in coming:
                    future.cancel()
    finally:
        torch.set_num_threads(count)


def divided(
    function: Callable[[Item], Result], items: Iterable[Item], devices: Sequence[torch.device]
) -> Iterator[Result]:
    """function of each item, in order; items of different devices at the same time, each device's in its own thread.

    Where all are of one device, an item is taken when its result is wanted, in this thread. Else all begin at once.

    Args:
        devices: of each item.
    """
    if len(set(devices)) < 2:
        return map(function, items)
    count = torch.get_num_threads()
    threads = {device: ThreadPoolExecutor(1, "device", torch.set_num_threads, (count,)) for device in set(devices)}

    def work(device: torch.device, item: Item) -> Result:
        with current(device):
            return function(item)

    futures = [threads[device].submit(work, device, item) for device, item in zip(devices, items, strict=True)]
    for thread in threads.values():
        thread.shutdown(wait=False)  # it ends after what it was given

    def results() -> Iterator[Result]:
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()

    return results()


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
