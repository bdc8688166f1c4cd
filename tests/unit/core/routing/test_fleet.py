"""What a gateway counts of its replicas: reports, reservations, and how they meet."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.core.routing.fleet import RESERVATION_TIMEOUT_S, Fleet, Reservation
from serve.core.routing.load import LoadReport


def fleet(count: int = 2) -> Fleet:
    made = Fleet(16)
    for row in range(count):
        made.add(f"r{row}", row, 0.0)
    return made


def reserve(to: Fleet, route_id: int, row: int = 0, now_s: float = 0.0) -> None:
    to.reserve(route_id, f"r{row}", Reservation(row, now_s, 100, 7, 9), 0.1)


def load(of: Fleet) -> list[tuple[float, ...]]:
    seen = of.view(0.0)
    columns = (seen.waiting, seen.queued_prefill_tokens, seen.active_blocks, seen.committed_blocks)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_a_reservation_counts_at_once() -> None:
    seen = fleet()
    reserve(seen, 1)
    assert load(seen) == [(1, 100, 7, 9), (0, 0, 0, 0)]


def test_a_report_that_has_the_request_takes_its_place() -> None:
    seen = fleet()
    reserve(seen, 1)
    seen.report("r0", LoadReport(waiting=1, queued_prefill_tokens=90, used_blocks=1, accepted=(1,)), 0.05)
    assert load(seen)[0] == (1, 90, 1, 0)
    seen.release(1)  # the first token: it is counted already
    assert load(seen)[0] == (1, 90, 1, 0)


def test_a_report_from_before_the_request_arrived_does_not() -> None:
    seen = fleet()
    reserve(seen, 1)
    seen.report("r0", LoadReport(waiting=2, queued_prefill_tokens=50), 0.01)
    assert load(seen)[0] == (3, 150, 7, 9)


def test_a_reservation_that_nobody_confirms_expires() -> None:
    seen = fleet()
    reserve(seen, 1, now_s=0.0)
    reserve(seen, 2, row=1, now_s=RESERVATION_TIMEOUT_S + 0.1)
    assert [row[0] for row in load(seen)] == [0, 1]


def test_routing_a_request_again_moves_its_reservation() -> None:
    seen = fleet()
    reserve(seen, 1, row=0)
    reserve(seen, 1, row=1)
    assert [row[0] for row in load(seen)] == [0, 1]


def test_a_replica_that_leaves_takes_its_reservations_along() -> None:
    seen = fleet(3)
    reserve(seen, 1, row=1)
    seen.remove("r1")
    seen.release(1)
    assert seen.view(0.0).replica_ids == ("r0", "r2")
    seen.add("r3", 1, 1.0)
    assert load(seen)[2] == (0, 0, 0, 0)


def test_unknown_candidates_are_left_out() -> None:
    assert fleet().view(0.0, ["r1", "gone"]).replica_ids == ("r1",)
    assert len(fleet().view(0.0, ["gone"])) == 0


def test_a_replica_whose_speed_is_unknown_is_taken_to_be_like_the_others() -> None:
    seen = fleet(2)
    for number in range(1, 60):
        report = LoadReport(
            prefilled_tokens=1000 * number, prefilled_pairs=1e6 * number, steps=10 * number, busy_s=0.5 * number
        )
        seen.report("r0", report, number * 0.5)
    seen.report("r1", LoadReport(), 30.0)
    rates = seen.view(30.0).prefill_token_s
    assert rates[0] > 1e-4  # not the prior, which is 2e-5
    assert rates[1] == pytest.approx(rates[0], rel=0.1)


def test_a_restarted_engine_counts_from_nothing_again() -> None:
    seen = fleet()
    seen.report("r0", LoadReport(steps=100, busy_s=50.0, prefilled_tokens=5000), 1.0)
    seen.report("r0", LoadReport(steps=1, busy_s=0.1), 2.0, new_epoch=True)
    rates = seen.view(2.0).prefill_token_s
    assert np.isfinite(rates).all()
    assert (rates > 0.0).all()


def test_age_is_since_the_last_word() -> None:
    seen = fleet()
    seen.report("r0", LoadReport(), 5.0)
    assert seen.view(6.0).age_s.tolist() == [1.0, 6.0]
    seen.all_alive(6.0)
    assert seen.view(6.0).age_s.tolist() == [0.0, 0.0]


steps = st.one_of(
    st.tuples(st.just("reserve"), st.integers(0, 9), st.integers(0, 2)),
    st.tuples(st.just("release"), st.integers(0, 9), st.just(0)),
    st.tuples(st.just("recall"), st.integers(0, 9), st.just(0)),
    st.tuples(st.just("accept"), st.integers(0, 9), st.integers(0, 2)),
)


@given(st.lists(steps, max_size=60))
def test_whatever_happens_to_requests_none_is_counted_twice_or_for_ever(happened: list[tuple[str, int, int]]) -> None:
    seen, waiting = fleet(3), {}
    for what, route_id, row in happened:
        if what == "reserve":
            reserve(seen, route_id, row)
            waiting[route_id] = row
        elif what == "accept":
            seen.report(f"r{row}", LoadReport(accepted=(route_id,)), 0.0)
            waiting.pop(route_id, None)
        else:
            getattr(seen, what)(route_id)
            waiting.pop(route_id, None)
    expected = [sum(1 for row in waiting.values() if row == number) for number in range(3)]
    assert [row[0] for row in load(seen)] == expected
    assert [row[1] for row in load(seen)] == [100 * count for count in expected]
