"""Heartbeats: silence is told from deafness."""

from hypothesis import given
from hypothesis import strategies as st

from serve.core.heartbeat import Heartbeats

LOOK_S = 0.25


def watch() -> Heartbeats:
    return Heartbeats(suspect_s=1.0, limit_s=2.0, look_s=LOOK_S)


@given(looks=st.lists(st.floats(0.01, 0.5), min_size=1, max_size=60), beating=st.sets(st.integers(0, 3)))
def test_a_rank_that_beats_before_every_look_is_never_late(looks: list[float], beating: set[int]) -> None:
    now_s, beats = 0.0, watch()
    for pause_s in looks:
        now_s += pause_s
        for rank in beating:
            beats = beats.beat(rank, now_s)
        beats, lateness = beats.look(now_s)
        assert not lateness.late


@given(looks=st.lists(st.floats(0.01, 0.5), min_size=30, max_size=60), silent=st.integers(0, 3))
def test_a_silent_rank_is_late_then_lost_and_no_other_is(looks: list[float], silent: int) -> None:
    now_s, beats = 0.0, watch()
    for rank in range(4):
        beats = beats.beat(rank, now_s)
    for pause_s in looks:
        now_s += pause_s
        for rank in set(range(4)) - {silent}:
            beats = beats.beat(rank, now_s)
        beats, lateness = beats.look(now_s)
        assert set(lateness.late) == ({silent} if now_s > 1.0 else set())
        assert set(lateness.lost) == ({silent} if now_s > 2.0 else set())


@given(deaf_s=st.floats(0.0, 1000.0))
def test_a_look_that_comes_late_blames_nobody(deaf_s: float) -> None:
    beats, _ = watch().beat(0, 10.0).look(10.0)
    after, lateness = beats.look(10.0 + deaf_s)
    assert not lateness.late
    _, lateness = after.beat(0, 10.0 + deaf_s + 0.1).look(10.0 + deaf_s + 0.2)
    assert not lateness.late


def test_a_rank_that_stays_silent_after_deafness_is_lost() -> None:
    beats, _ = watch().beat(0, 0.0).look(0.0)
    beats, _ = beats.look(60.0)
    now_s, lateness = 60.0, None
    while not (lateness and lateness.lost):
        now_s += LOOK_S
        beats, lateness = beats.look(now_s)
    assert now_s < 63.0


def test_a_rank_that_never_beats_is_not_watched() -> None:
    _, lateness = watch().look(100.0)
    assert not lateness.late
