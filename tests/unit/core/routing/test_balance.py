"""Shares of requests and work."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.core.routing.balance import Balance

ROWS = np.arange(4)
ALIKE = np.ones(4)


def filled(routed: list[int], work_s: float = 1.0) -> Balance:
    balance = Balance()
    for row in range(4):
        balance.add(row, list(range(row)))
    for row in routed:
        balance.count(row, work_s)
    return balance


@given(st.lists(st.integers(0, 3), max_size=200))
def test_shares_have_mean_one(routed: list[int]) -> None:
    for column in filled(routed).shares(ROWS, ALIKE):
        assert column.mean() == pytest.approx(1.0)
        assert column.min() > 0.0


def test_a_few_requests_are_chance() -> None:
    assert filled([0, 0]).shares(ROWS, ALIKE).lasting[0] < 1.15


def test_who_gets_everything_has_four_times_the_mean_in_the_end() -> None:
    shares = filled([0] * 2000).shares(ROWS, ALIKE)
    assert shares.requests[0] > 3.5
    assert shares.work[0] > 3.5
    assert shares.requests[1] < 0.2


def test_one_request_with_much_work_is_seen_in_the_work_alone() -> None:
    balance = filled([0, 1, 2, 3] * 20)
    balance.count(2, 500.0)
    shares = balance.shares(ROWS, ALIKE)
    assert shares.work[2] > 2.0
    assert shares.requests[2] < 1.1


def test_a_faster_replica_is_due_more_requests_and_a_slower_one_not_fewer() -> None:
    shares = filled([0, 1, 2, 3] * 200).shares(ROWS, np.array([16 / 7, 1.0, 1.0, 1.0]))
    assert shares.requests.tolist() == pytest.approx([7 / 16, 1.0, 1.0, 1.0], rel=0.05)
    assert shares.lasting.tolist() == pytest.approx([7 / 16, 1.0, 1.0, 1.0], rel=0.05)
    assert shares.work.tolist() == pytest.approx([1.0] * 4, rel=0.05)  # it was measured in time already


def test_a_newcomer_owes_nothing_and_takes_nothing_from_the_others() -> None:
    balance = filled([0, 1, 2, 3] * 50)
    balance.add(20, [0, 1, 2, 3])
    shares = balance.shares(np.array([0, 1, 2, 3, 20]), np.ones(5))
    assert shares.requests.tolist() == pytest.approx([1.0] * 5, abs=0.05)


def test_what_is_taken_back_was_never_there() -> None:
    balance = filled([])
    before = balance.shares(ROWS, ALIKE)
    balance.count(1, 2.0)
    balance.take_back(1, 2.0)
    for one, other in zip(before, balance.shares(ROWS, ALIKE), strict=True):
        assert one.tolist() == pytest.approx(other.tolist())
