from dataclasses import replace

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from serve.router.hints import RouteHints
from serve.router.records import RouteRecord, make_record
from serve.router.trace import KEPT_CANDIDATES, RouteTrace, shorten
from serve.router.trace_book import TraceBook
from tests.unit.router.boards import announce, holds, make_board, prompt, request


@given(count=st.integers(1, 60), chosen=st.integers(0, 59))
def test_a_record_of_many_candidates_keeps_the_best_and_the_chosen_one(count: int, chosen: int) -> None:
    chosen %= count
    names = [f"app#m#r{number}" for number in range(count)]
    board, _, _ = make_board(*names)
    holds(board, names[count // 2], prompt(1))
    sequence = request("one", prompt(1))
    trace = announce(board, sequence)
    board.choose(sequence)
    before = trace.decision
    board.accepted("one", names[chosen])
    record = make_record(trace)
    assert record.decision is not None
    assert before is not None
    shown = record.decision.candidates
    assert len(shown) == min(count, KEPT_CANDIDATES)
    assert record.decision.num_candidates == count
    assert [one.replica for one in shown if one.chosen] == [f"r{chosen}"] == [record.replica]
    best = [name.removeprefix("app#m#") for name in before.ranked]
    assert [one.replica for one in shown[:-1]] == best[: len(shown) - 1]
    for one in shown:
        row = before.view.replica_ids.index(f"app#m#{one.replica}")
        assert one.rank == best.index(one.replica) + 1
        assert one.cost == before.scores.cost[row]
        assert one.hit_blocks.gpu == before.match.hit_blocks[row]
        assert one.terms == {name: term[row] for name, term in before.scores.terms.items()}


def test_infinite_costs_can_be_told_in_json() -> None:
    board, _, _ = make_board("a", "b")
    trace = announce(board, request("one", prompt(1)))
    board.choose(request("one", prompt(1)))
    assert trace.decision is not None
    trace.decision = replace(
        trace.decision,
        scores=replace(trace.decision.scores, cost=np.array([np.inf, 1.0]), terms={"x": np.array([np.nan, 1.0])}),
    )
    encoded = msgspec.json.encode(make_record(trace))
    decision = msgspec.json.decode(encoded, type=RouteRecord).decision
    assert decision is not None
    assert {(one.cost, one.terms["x"]) for one in decision.candidates} == {(None, None), (1.0, 1.0)}


def test_a_partial_order_is_kept_as_it_is() -> None:
    board, _, _ = make_board(*(f"r{number}" for number in range(40)))
    trace = announce(board, request("one", prompt(1)))
    board.choose(request("one", prompt(1)))
    assert trace.decision is not None
    short = shorten(replace(trace.decision, order=trace.decision.order[:3]), 30)
    assert len(short.view) == 3
    assert short.view.replica_ids[-1] == "r30"


def test_a_session_is_shown_by_a_pseudonym() -> None:
    trace = RouteTrace(request("one", prompt(1)), RouteHints("r", session="alice"), 1.0)
    assert make_record(trace).session not in ("", "alice")


@given(kept=st.integers(0, 5), ended=st.lists(st.integers(0, 19), unique=True), shared=st.booleans())
def test_a_book_remembers_those_in_flight_and_the_last_that_ended(kept: int, ended: list[int], shared: bool) -> None:
    book = TraceBook()
    traces = [
        RouteTrace(request(f"s{number}", [1]), RouteHints("same" if shared else f"r{number}"), 1.0)
        for number in range(20)
    ]
    for trace in traces:
        book.add(trace)
    for number in ended:
        book.ended(traces[number], kept)
    gone = set(ended[: max(0, len(ended) - kept)])
    for number, trace in enumerate(traces):
        known = number not in gone
        assert (book.sequence(f"s{number}") is trace) is known
        assert (trace in book.request(trace.hints.request_id)) is known
    assert len(book) == 20 - len(gone)
    assert not book.request("nobody")
