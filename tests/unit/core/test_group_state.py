"""Group state machine: whatever happens, in whatever order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.core.group_state import (
    TRANSITIONS,
    Action,
    AwaitMemory,
    Cleared,
    EndRanks,
    EngineLost,
    Event,
    FailStreams,
    Group,
    GroupState,
    Launched,
    LaunchFailed,
    LogEntry,
    MemoryReleased,
    RankLost,
    RanksEnded,
    RankStarted,
    Release,
    Stalled,
    StopRequested,
    Suspected,
    decide,
    from_line,
    replay,
    to_line,
)

REASONS = st.text(max_size=5)
EVENTS = st.one_of(
    st.builds(Launched),
    st.builds(LaunchFailed, REASONS),
    st.builds(RankStarted, st.integers(0, 3), st.just("node"), st.integers(1, 9)),
    st.builds(RankLost, st.integers(0, 3), REASONS),
    st.builds(EngineLost, REASONS),
    st.builds(Stalled, REASONS),
    st.builds(Suspected, REASONS),
    st.builds(Cleared),
    st.builds(StopRequested),
    st.builds(RanksEnded, st.lists(REASONS, max_size=2).map(tuple)),
    st.builds(MemoryReleased, st.lists(REASONS, max_size=2).map(tuple)),
)
HISTORIES = st.lists(EVENTS, max_size=40)


def run(events: list[Event]) -> list[LogEntry]:
    group, log = Group(), []
    for at_s, event in enumerate(events):
        after, actions = decide(group, event)
        log.append(LogEntry(float(at_s), group, event, after, actions))
        group = after
    return log


def done(log: list[LogEntry]) -> list[Action]:
    return [action for entry in log for action in entry.actions]


@given(events=HISTORIES)
def test_nothing_leaves_stopped(events: list[Event]) -> None:
    for entry in run(events):
        if entry.before.state is GroupState.STOPPED:
            assert entry.after == entry.before
            assert entry.actions == ()


@given(events=HISTORIES)
def test_a_failed_group_cuts_its_streams_and_kills_its_ranks_at_once(events: list[Event]) -> None:
    for entry in run(events):
        if entry.after.state is GroupState.FAILED and entry.before.state is not GroupState.FAILED:
            assert entry.actions == (FailStreams(entry.after.reason), EndRanks(politely=False))
        if entry.before.state is GroupState.FAILED:
            assert entry.after.state in (GroupState.FAILED, GroupState.STOPPED)
            assert entry.after.reason == entry.before.reason, "the first reason is the one that matters"


@given(events=HISTORIES)
def test_stopped_comes_after_ended_ranks_and_then_free_memory(events: list[Event]) -> None:
    log = run(events)
    for number, entry in enumerate(log):
        if entry.after.state is GroupState.STOPPED and entry.before.state is not GroupState.STOPPED:
            history = done(log[: number + 1])
            kinds = [type(action) for action in history]
            assert kinds == [FailStreams, EndRanks, AwaitMemory, Release]
            ended = [i for i, past in enumerate(log[:number]) if isinstance(past.event, RanksEnded)]
            assert ended
            assert isinstance(entry.event, MemoryReleased)


@given(events=HISTORIES)
def test_each_thing_is_asked_for_once_and_streams_are_cut_first(events: list[Event]) -> None:
    kinds = [type(action) for action in done(run(events))]
    assert kinds == [FailStreams, EndRanks, AwaitMemory, Release][: len(kinds)]


@given(events=HISTORIES)
def test_a_group_that_lost_a_rank_never_serves_again(events: list[Event]) -> None:
    lost = False
    for entry in run(events):
        is_end = isinstance(entry.event, RankLost | EngineLost | LaunchFailed | StopRequested)
        lost = lost or (is_end and entry.after != entry.before)
        assert not (lost and entry.after.serves)


@given(events=HISTORIES)
def test_a_log_is_replayed_to_the_same_states(events: list[Event]) -> None:
    log = run(events)
    written = [from_line(to_line(entry)) for entry in log]
    assert written == log
    assert replay(written) == [entry.after for entry in log]


def test_a_log_with_a_gap_or_of_another_decision_is_refused() -> None:
    log = run([Launched(), Suspected("rank 1 is late"), Cleared(), StopRequested()])
    with pytest.raises(ValueError, match="entry 1: begins at"):
        replay([log[0], *log[2:]])
    forged = LogEntry(0.0, log[0].before, Suspected("x"), log[0].after)
    with pytest.raises(ValueError, match="entry 0: "):
        replay([forged])


def test_a_way_from_suspicion_to_loss() -> None:
    log = run(
        [Launched(), Suspected("rank 1 is silent"), RankLost(1, "silent for 2.1 s"), RanksEnded(), RankLost(0, "")]
    )
    assert [entry.after.state.value for entry in log] == ["ready", "degraded", "failed", "failed", "failed"]
    assert log[-1].after.reason == "rank 1: silent for 2.1 s"
    after, actions = decide(log[-1].after, MemoryReleased(("GPU 0: 9 GiB",)))
    assert after.state is GroupState.STOPPED
    assert actions == (Release(),)


def test_stop_is_polite_unless_the_group_has_failed() -> None:
    assert done(run([Launched(), StopRequested()]))[1] == EndRanks(politely=True)
    assert done(run([StopRequested()]))[1] == EndRanks(politely=True)
    assert done(run([Launched(), EngineLost("x"), StopRequested()]))[1] == EndRanks(politely=False)


def test_memory_counts_only_when_the_ranks_are_gone() -> None:
    assert run([EngineLost("x"), MemoryReleased()])[-1].after.state is GroupState.FAILED


def test_every_state_is_reached_and_every_one_but_the_last_is_left() -> None:
    states = set(GroupState)
    assert {before for before, _ in TRANSITIONS} == states - {GroupState.STOPPED}
    assert {after for after, _ in TRANSITIONS.values()} == states - {GroupState.STARTING}
