import msgspec
import pytest

from serve.core.request import PrefillInfo
from serve.core.routing.load import LoadReport
from serve.router.hints import RouteHints
from serve.router.records import make_record
from serve.router.trace import KEPT_REFUSALS, RouteState
from tests.unit.router.boards import (
    SIZE,
    announce,
    evicts,
    first_choice,
    heard,
    holds,
    make_board,
    metadata,
    prompt,
    request,
    router_of,
)


def test_a_prompt_goes_to_who_holds_it_and_the_replica_is_told() -> None:
    board, _, _ = make_board("a", "b", "c")
    holds(board, "b", prompt(1))
    sequence = request("one", prompt(1))
    announce(board, sequence)
    choice = board.choose(sequence)
    assert choice is not None
    assert choice.best[0] == "b"
    assert set(choice.best) == {"a", "b", "c"}
    assert choice.request == msgspec.structs.replace(sequence, expected_cached_tokens=8 * SIZE)


def test_a_burst_spreads_before_any_replica_has_answered() -> None:
    board, _, _ = make_board("a", "b", "c", "d")
    chosen = []
    for number in range(32):
        sequence = request(f"s{number}", prompt(number))
        announce(board, sequence)
        chosen.append(first_choice(board, sequence))
    assert {chosen.count(name) for name in "abcd"} == {8}


def test_who_refused_comes_last_until_all_have() -> None:
    board, _, _ = make_board("a", "b", "c")
    holds(board, "b", prompt(1))
    sequence = request("one", prompt(1))
    trace = announce(board, sequence)
    assert first_choice(board, sequence) == "b"
    second = first_choice(board, sequence, "b")
    assert second != "b"
    third = first_choice(board, sequence, second)
    assert third not in (second, "b")
    assert first_choice(board, sequence, third) == "b", "everybody was full: whoever is best may have room now"
    assert first_choice(board, sequence, "b") != "b", "another round"
    assert trace.refused == ["b", second, third, "b"]
    assert trace.attempts == 5
    assert board.counts.refusals == 4


def test_a_sequence_that_is_refused_for_ever_needs_no_more_memory() -> None:
    board, _, _ = make_board("a", "b")
    sequence = request("one", prompt(1))
    trace = announce(board, sequence)
    refused_by = ""
    for _ in range(500):
        refused_by = first_choice(board, sequence, refused_by)
    assert len(trace.refused) == KEPT_REFUSALS
    assert trace.attempts == 500


def test_who_is_full_is_passed_over_and_the_next_is_told_of_its_own_cache() -> None:
    board, _, _ = make_board("a", "b", "c")
    holds(board, "a", prompt(1))
    holds(board, "b", prompt(1)[: 4 * SIZE])
    sequence = request("one", prompt(1))
    trace = announce(board, sequence)
    choice = board.choose(sequence, has_room=lambda name: name != "a")
    assert choice is not None
    assert choice.best == ["b", "c"]
    assert choice.request.expected_cached_tokens == 4 * SIZE
    record = make_record(trace)
    assert record.decision is not None
    assert (record.replica, record.decision.passed_over) == ("b", ["a"])
    assert [(one.replica, one.rank, one.chosen) for one in record.decision.candidates][:2] == [
        ("a", 1, False),
        ("b", 2, True),
    ]
    nobody = board.choose(sequence, has_room=lambda name: False)
    assert nobody is not None
    assert nobody.best == []


def test_a_sequence_that_waits_counts_once_however_often_it_is_ranked() -> None:
    board, _, _ = make_board("a", "b")
    waiting = request("waiting", prompt(1))
    trace = announce(board, waiting)
    for _ in range(20):
        first_choice(board, waiting)
    other = request("other", prompt(2))
    other_trace = announce(board, other)
    board.choose(other)
    assert other_trace.decision is not None
    assert other_trace.decision.view.waiting.sum() == 1
    assert trace.decision is not None
    assert trace.decision.view.waiting.sum() == 0, "a sequence waits behind itself"


def test_a_sequence_counts_where_it_was_accepted() -> None:
    board, _, _ = make_board("a", "b")
    holds(board, "a", prompt(1))
    sequence = request("one", prompt(1))
    trace = announce(board, sequence)
    assert first_choice(board, sequence) == "a"
    board.accepted("one", "b")
    assert (trace.replica_id, trace.rank, trace.expected_tokens) == ("b", 2, 0)
    other = announce(board, request("two", prompt(2)))
    board.choose(request("two", prompt(2)))
    assert other.decision is not None
    view = other.decision.view
    assert dict(zip(view.replica_ids, view.waiting.tolist(), strict=True)) == {"a": 0.0, "b": 1.0}


def test_a_sequence_counts_no_more_once_it_has_its_first_token() -> None:
    board, _, clock = make_board("a", "b")
    sequence = request("one", prompt(1))
    trace = announce(board, sequence)
    chosen = first_choice(board, sequence)
    trace.replica_id, trace.first_s, trace.prefill = chosen, clock.now_s + 0.5, PrefillInfo(cached_tokens=16)
    board.began(trace)  # Serve's news that it was accepted comes later
    board.accepted("one", chosen)
    assert trace.state is RouteState.ROUTED
    assert board.counts.cached_tokens == 16
    board.close(trace)
    probe = announce(board, request("probe", prompt(3)))
    board.choose(request("probe", prompt(3)))
    assert probe.decision is not None
    assert probe.decision.view.waiting.sum() == 0


def test_a_replica_that_goes_is_forgotten_with_all_that_it_held() -> None:
    board, feeds, _ = make_board("a", "b")
    holds(board, "a", prompt(1))
    assert len(router_of(board).index) == 8
    board.roster.update({"b": metadata()})
    assert list(feeds.heard) == ["b"]
    assert heard(board) == (1, 0)
    board.roster.update({"b": metadata(), "c": metadata()})  # perhaps in its place in the index
    trace = announce(board, request("one", prompt(1)))
    board.choose(request("one", prompt(1)))
    assert trace.decision is not None
    assert trace.decision.view.replica_ids == ("b", "c")
    assert trace.decision.match.hit_blocks.tolist() == [0, 0]


def test_a_dead_replica_stays_dead_though_the_controller_still_lists_it() -> None:
    board, feeds, _ = make_board("a", "b")
    board.roster.died("a")
    board.roster.update({"a": metadata(), "b": metadata()})
    choice = board.choose(request("one", prompt(1)))
    assert choice is not None
    assert choice.best == ["b"]
    assert list(feeds.heard) == ["b"]
    board.roster.update({"b": metadata()})
    board.roster.update({"a": metadata(), "b": metadata()})  # another one of this name
    assert set(feeds.heard) == {"a", "b"}


def test_news_of_a_replica_that_is_gone_are_harmless() -> None:
    board, _, _ = make_board("a")
    board.roster.died("a")
    holds(board, "a", prompt(1))
    board.roster.report("a", LoadReport())
    board.roster.connected("a")
    board.roster.lost("a")
    board.accepted("nobody", "a")
    assert len(router_of(board).index) == 0
    assert board.choose(request("one", prompt(1))) is None


def test_without_replicas_there_is_no_choice() -> None:
    board, _, _ = make_board()
    trace = announce(board, request("one", prompt(1)))
    assert board.choose(request("one", prompt(1))) is None
    board.close(trace)


def test_when_all_blocks_have_another_size_the_index_starts_anew() -> None:
    board, feeds, _ = make_board("a", "b")
    holds(board, "a", prompt(1))
    waiting = request("waiting", prompt(1))
    trace = announce(board, waiting)
    board.choose(waiting)
    board.roster.update({"b": metadata(), "c": metadata(SIZE * 2)})
    assert router_of(board).tokens_per_block == SIZE
    board.roster.update({"c": metadata(SIZE * 2), "d": metadata(SIZE * 2)})
    assert router_of(board).tokens_per_block == 2 * SIZE
    assert len(router_of(board).index) == 0
    assert set(feeds.heard) == {"c", "d"}
    board.choose(waiting)  # hashed before in other blocks
    assert trace.route is not None
    assert len(trace.route.hashes) == 4
    board.accepted("waiting", "c")
    board.close(trace)


def test_a_replica_with_other_blocks_is_routed_to_by_its_load_alone() -> None:
    board, _, _ = make_board("a", "b")
    board.roster.update({"a": metadata(), "b": metadata(), "c": metadata(SIZE * 2)})
    board.roster.connected("c")
    holds(board, "c", prompt(1))
    assert len(router_of(board).index) == 0
    board.roster.report("c", LoadReport(running=3, used_blocks=10, total_blocks=500))
    trace = announce(board, request("one", prompt(1)))
    board.choose(request("one", prompt(1)))
    assert trace.decision is not None
    view = trace.decision.view
    number = view.replica_ids.index("c")
    assert (view.running[number], view.active_blocks[number], view.total_blocks[number]) == (3, 20, 1000)


def test_a_replica_that_says_nothing_is_as_busy_as_this_gateway_keeps_it() -> None:
    board, feeds, _ = make_board("a")
    board.roster.update({"a": metadata(), "mute": metadata(with_address=False)})
    assert list(feeds.heard) == ["a"]
    assert heard(board) == (1, 1)
    for number in range(40):
        sequence = request(f"s{number}", prompt(number))
        announce(board, sequence)
        chosen = first_choice(board, sequence)
        board.accepted(sequence.request_id, chosen)
    probe = announce(board, request("probe", prompt(99)))
    board.choose(request("probe", prompt(99)))
    assert probe.decision is not None
    view = probe.decision.view
    waiting = dict(zip(view.replica_ids, view.waiting.tolist(), strict=True))
    assert waiting["mute"] == pytest.approx(20, abs=2)
    assert sum(waiting.values()) == 40


def test_a_replica_that_falls_silent_is_as_busy_as_it_said_and_as_this_gateway_keeps_it() -> None:
    board, _, clock = make_board("a", "b")
    board.roster.report("a", LoadReport(total_blocks=800, used_blocks=200))
    board.roster.lost("a")
    sequence = request("one", prompt(1))
    trace = announce(board, sequence)
    board.choose(sequence)
    board.accepted("one", "a")
    trace.first_s = clock.now_s
    board.began(trace)
    probe = announce(board, request("probe", prompt(2)))
    board.choose(request("probe", prompt(2)))
    assert probe.decision is not None
    view = probe.decision.view
    number = view.replica_ids.index("a")
    assert (view.running[number], view.active_blocks[number], view.total_blocks[number]) == (1, 200, 800)
    board.roster.connected("a")
    board.roster.report("a", LoadReport(total_blocks=800))
    board.close(trace)


def test_calls_that_nobody_announced_are_routed_and_leave_nothing() -> None:
    board, _, _ = make_board("a", "b")
    for number in range(10):
        sequence = request(f"s{number}", prompt(number))
        board.accepted(sequence.request_id, first_choice(board, sequence))
    assert not board._strangers
    assert not board._open


@pytest.mark.parametrize("policy", ["auto", "power_of_two", "random", "round_robin"])
def test_a_preview_is_what_happens_next_and_changes_nothing(policy: str) -> None:
    board, _, _ = make_board("a", "b", "c", "d", policy=policy)
    for number in range(20):
        sequence = request(f"s{number}", prompt(number))
        asked = [announce(board, sequence) for _ in range(3)]
        for trace in asked:
            board.preview(sequence, trace)
        places = {trace.decision.replica_id for trace in asked if trace.decision is not None}
        announce(board, sequence)
        assert places == {first_choice(board, sequence)}


def test_misses_are_counted_by_tenant_and_reason() -> None:
    board, _, _ = make_board("a", "b")
    tokens = prompt(1)
    holds(board, "a", tokens)
    evicts(board, "a", tokens)
    trace = announce(board, request("one", tokens), RouteHints("r", tenant="acme"))
    board.choose(request("one", tokens))
    board.accepted("one", "a")
    assert [(span.reason, span.first_block, span.num_blocks) for span in trace.misses] == [("evicted", 0, 8)]
    fresh = announce(board, request("two", prompt(2)))
    board.choose(request("two", prompt(2)))
    board.accepted("two", "b")
    assert make_record(fresh).misses[0].reason == "never_seen"
    assert dict(board.counts.missed_blocks) == {("acme", "evicted"): 8, ("default", "never_seen"): 8}


def test_the_seed_of_a_salted_prompt_is_its_own() -> None:
    board, _, _ = make_board("a", "b")
    tokens = prompt(1)
    holds(board, "a", tokens)
    holds(board, "b", tokens, salt="pepper")
    assert first_choice(board, request("one", tokens, salt="pepper")) == "b"
    assert first_choice(board, request("two", tokens)) == "a"


def test_sequences_of_one_prompt_are_hashed_once_each_on_its_own_way() -> None:
    board, _, _ = make_board("a", "b")
    packed = request("x", prompt(1))
    traces = [announce(board, msgspec.structs.replace(packed, request_id=f"n{number}")) for number in range(4)]
    for number in range(4):
        board.choose(msgspec.structs.replace(packed, request_id=f"n{number}"))
    assert len({id(trace.prompt) for trace in traces}) == 1
    assert len({trace.route_id for trace in traces}) == 4


def test_closing_stops_hearing() -> None:
    board, feeds, _ = make_board("a")
    board.roster.feeds.close()
    assert feeds.closed
