"""Calls that threads make ahead: results in order, few at a time, and errors in their turn."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from fastvlm.models.ahead import Ahead


def test_results_are_in_the_order_of_calls() -> None:
    second_is_done = threading.Event()

    def first() -> int:
        assert second_is_done.wait(10)
        return 1

    def second() -> int:
        second_is_done.set()
        return 2

    with Ahead([first, second], workers=2) as ahead:
        assert list(ahead) == [1, 2]
        assert ahead.is_ready, "the end does not have to be waited for"


def test_only_the_limit_is_called_ahead() -> None:
    taken: list[int] = []

    def calls() -> Iterator[Callable[[], int]]:
        for n in range(100):
            taken.append(n)
            yield partial(int, n)

    with Ahead(calls(), workers=1, limit=3) as ahead:
        for n in range(20):
            assert next(ahead) == n
            assert len(taken) == n + 4


def test_next_result_is_ready_once_its_call_returns() -> None:
    may_return = threading.Event()
    with Ahead([lambda: may_return.wait(10)], workers=1) as ahead:
        assert not ahead.is_ready
        may_return.set()
        assert next(ahead) is True


def test_error_is_raised_in_its_turn_and_threads_end() -> None:
    def fail() -> int:
        raise ValueError("wrong")

    with Ahead([lambda: 1, fail, lambda: 3], workers=2) as ahead:
        assert next(ahead) == 1
        with pytest.raises(ValueError, match="wrong"):
            next(ahead)
        assert next(ahead) == 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastvlm-ahead")]
