"""Row-wise work spread over threads."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """function of each item, in order; as many items at a time as torch has threads, each on one of them.

    Many short tensor operations run so much better than with all threads on one operation at a time, as each
    operation would end by waiting for its slowest thread. Results do not depend on the number of threads.
    """
    count = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(count)  # what a thread sets for itself is also the start of every new thread
