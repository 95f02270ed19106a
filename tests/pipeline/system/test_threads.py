"""Work that is spread over threads gives what it would give without them, and fails as it would."""

import threading
from collections.abc import Iterator

import pytest
import torch

from bitpress.pipeline.system.threads import divided, map_threads, one_ahead


def test_one_ahead_keeps_the_order_and_is_ahead_by_one() -> None:
    started: list[int] = []
    results = one_ahead(lambda item: started.append(item) or -item, range(5))
    assert next(results) == 0
    assert next(results) == -1
    assert started in ([0, 1], [0, 1, 2])  # the thread may not have come to the third yet
    assert list(results) == [-2, -3, -4]
    assert list(one_ahead(abs, [])) == []


def test_one_ahead_works_beside_its_caller_and_leaves_torchs_threads_to_it() -> None:
    count = torch.get_num_threads()
    found = list(one_ahead(lambda item: (threading.get_ident(), torch.get_num_threads()), range(3)))
    assert threading.get_ident() not in dict(found)
    assert {threads for _, threads in found} == {1}
    assert torch.get_num_threads() == count


def test_an_error_reaches_the_caller_in_its_turn() -> None:
    results = one_ahead(lambda item: 1 // item, [2, 1, 0])
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_map_threads_keeps_the_order() -> None:
    assert map_threads(abs, range(-20, 0)) == list(range(20, 0, -1))


class TestDivided:
    def test_each_device_has_its_thread_and_results_come_in_order(self) -> None:
        devices = [torch.device(name) for name in ("cpu", "meta", "cpu", "meta", "meta")]
        second = threading.Event()

        def work(item: int) -> tuple[int, int]:
            assert item or second.wait(10), "the second device did not begin beside the first"
            second.set() if item == 1 else None
            return item, threading.get_ident()

        results = list(divided(work, range(5), devices))
        assert [item for item, _ in results] == list(range(5))
        threads = [thread for _, thread in results]
        assert threads[0] == threads[2] != threads[1] == threads[3] == threads[4]
        assert threading.get_ident() not in threads

    def test_one_device_takes_an_item_when_its_result_is_wanted(self) -> None:
        taken: list[int] = []

        def items() -> Iterator[int]:
            for number in range(3):
                taken.append(number)
                yield number

        results = divided(abs, items(), [torch.device("cpu")] * 3)
        assert (next(results), taken) == (0, [0])

    def test_an_error_reaches_the_caller_in_its_turn(self) -> None:
        results = divided(lambda item: 1 // item, [1, 0], [torch.device("cpu"), torch.device("meta")])
        assert next(results) == 1
        with pytest.raises(ZeroDivisionError):
            next(results)
