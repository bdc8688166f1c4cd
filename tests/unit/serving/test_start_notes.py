"""What starting replicas let others know, and how long that counts."""

import asyncio
import time
from collections.abc import Callable

import pytest

from serve.start_notes import StartNotes, starts_of
from tests.unit.serving.fake_values import FakeValues

FINGERPRINT = "a" * 64


class Now:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def notes(
    values: FakeValues, now: Now, replica: str = "r1", app: str = "llm", deployment: str = "model-m"
) -> StartNotes:
    return StartNotes(values, app, deployment, replica, now)


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait for what is written in another thread; nothing announces it."""
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.001)


async def until_written(values: FakeValues, text: str) -> None:
    await eventually(lambda: any(text.encode() in value for value in list(values.values.values())))


async def test_what_a_replica_says_can_be_read_until_it_has_started() -> None:
    values, now = FakeValues(), Now()
    one, other = notes(values, now, "r1"), notes(values, now, "r2", deployment="model/n x")
    one.say("downloading")
    other.say("checking")
    with one.kept(), other.kept():
        await until_written(values, "downloading")
        await until_written(values, "checking")
        assert starts_of(values, "llm", now()) == {"model-m": ["downloading"], "model/n x": ["checking"]}
        assert starts_of(values, "l", now()) == {}
    await eventually(lambda: not values.values)


async def test_who_has_said_nothing_yet_is_not_shown() -> None:
    values, now = FakeValues(), Now()
    with notes(values, now).kept():
        await eventually(lambda: bool(values.values))
        assert starts_of(values, "llm", now()) == {}


async def test_the_dead_are_not_shown_and_forgotten_in_the_end() -> None:
    values, now = FakeValues(), Now()
    killed = notes(values, now)
    killed.say("downloading")
    with killed.kept():
        await until_written(values, "downloading")
        left = dict(values.values)
    values.values |= left
    assert starts_of(values, "llm", now() + 31) == {}
    assert values.values
    assert starts_of(values, "llm", now() + 601) == {}
    assert not values.values


def test_failures_are_counted_over_replicas_and_not_for_ever() -> None:
    values, now = FakeValues(), Now()
    one, other = notes(values, now, "r1"), notes(values, now, "r2")
    one.note_failure(FINGERPRINT)
    one.note_failure(FINGERPRINT)
    assert (one.failures_elsewhere(FINGERPRINT), other.failures_elsewhere(FINGERPRINT)) == (0, 1)
    other.note_failure(FINGERPRINT)
    assert one.failures_elsewhere(FINGERPRINT) == 1
    assert notes(values, now, deployment="model-n").failures_elsewhere(FINGERPRINT) == 0
    assert one.failures_elsewhere("b" * 64) == 0
    now.now_s += 3601
    assert one.failures_elsewhere(FINGERPRINT) == 0


def test_a_rejection_is_known_to_all_replicas_and_ends_the_count() -> None:
    values, now = FakeValues(), Now()
    one, other = notes(values, now, "r1"), notes(values, now, "r2")
    one.note_failure(FINGERPRINT)
    other.note_rejection(FINGERPRINT)
    assert one.rejections() == {FINGERPRINT: 1000.0}
    assert other.failures_elsewhere(FINGERPRINT) == 0
    now.now_s += 3601
    assert one.rejections() == {}


def test_what_works_is_known_and_ends_the_count() -> None:
    values, now = FakeValues(), Now()
    one, other = notes(values, now, "r1"), notes(values, now, "r2")
    one.note_failure(FINGERPRINT)
    assert not other.has_worked(FINGERPRINT)
    other.note_success(FINGERPRINT)
    now.now_s += 1e6
    assert one.has_worked(FINGERPRINT)
    assert not one.has_worked("b" * 64)
    assert other.failures_elsewhere(FINGERPRINT) == 0


async def test_no_start_fails_of_its_notes(caplog: pytest.LogCaptureFixture) -> None:
    values, now = FakeValues(), Now()
    values.broken = True
    one = notes(values, now)
    with one.kept():
        one.note_failure(FINGERPRINT)
        one.note_rejection(FINGERPRINT)
        assert (one.failures_elsewhere(FINGERPRINT), one.rejections()) == (0, {})
        assert starts_of(values, "llm", now()) == {}
    assert "could not be written" in caplog.text
