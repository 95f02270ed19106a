"""Work that is spread over threads gives what it would give without them, and fails as it would."""

import threading

import pytest
import torch

from bitpress.pipeline.system.threads import map_threads, one_ahead


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
