"""KvFeed: whatever the network does to the messages, what is handed on is the cache at one moment, and time goes on."""

import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.core.kv_events import GPU, HOST, KvEvent, KvEventBatch, KvRemoved, KvSnapshot, KvStored
from serve.core.kv_feed import (
    MAX_BUFFERED,
    MAX_RESEND_S,
    RESEND_S,
    FeedState,
    FeedStep,
    next_tick_s,
    on_batch,
    on_heartbeat,
    on_part,
    on_snapshot,
    on_tick,
)

Content = dict[int, int]  # tier of each block


def apply(content: Content, events: Iterable[KvEvent]) -> None:
    for event in events:
        match event:
            case KvSnapshot():
                content.clear()
                tiers = event.tiers or (GPU,) * len(event.block_hashes)
                content.update(zip(event.block_hashes, tiers, strict=True))
            case KvStored():
                content.update(dict.fromkeys(event.block_hashes, event.tier))
            case KvRemoved():
                for block in event.block_hashes:
                    content.pop(block, None)


def snapshot(sequence: int, content: Content) -> KvEventBatch:
    return KvEventBatch(sequence, (KvSnapshot(tuple(content), (0,) * len(content), tuple(content.values())),))


def stored(sequence: int, *blocks: int) -> KvEventBatch:
    return KvEventBatch(sequence, (KvStored(blocks, 0),))


@dataclass
class Replica:
    """An engine and its publisher. Remembers what the cache held after each batch of each epoch."""

    rng: random.Random
    epoch: int = 0
    sequence: int = 0
    content: Content = field(default_factory=dict)
    history: dict[tuple[int, int], Content] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.epoch, self.sequence, self.content = self.rng.getrandbits(64), 0, {}
        self.history[self.epoch, 0] = {}

    def step(self) -> KvEventBatch:
        events: list[KvEvent] = [KvSnapshot((), ())] if self.rng.random() < 0.05 else []
        for _ in range(self.rng.randint(1, 3)):
            blocks = tuple(self.rng.sample(range(20), self.rng.randint(1, 4)))
            tier = self.rng.choice([GPU, GPU, HOST])
            events.append(KvStored(blocks, 0, tier) if self.rng.random() < 0.6 else KvRemoved(blocks))
        apply(self.content, events)
        self.sequence += 1
        self.history[self.epoch, self.sequence] = dict(self.content)
        # A publisher that fell behind its engine publishes the content instead of what it missed.
        if self.rng.random() < 0.1:
            return snapshot(self.sequence, self.content)
        return KvEventBatch(self.sequence, tuple(events))


@dataclass(frozen=True)
class Batch:
    epoch: int
    batch: KvEventBatch


@dataclass(frozen=True)
class Heartbeat:
    epoch: int
    sequence: int


@dataclass(frozen=True)
class Answer:
    epoch: int
    request: int
    batch: KvEventBatch


Message = Batch | Heartbeat | Answer


@dataclass
class Gateway:
    """A feed and what it told so far. Checks after each input that this is what the cache held at one moment."""

    replica: Replica
    state: FeedState = field(default_factory=FeedState)
    mirror: Content = field(default_factory=dict)
    now_s: float = 0.0

    def receive(self, message: Message) -> int:
        before = self.state
        match message:
            case Batch():
                step = on_batch(self.state, message.epoch, message.batch, self.now_s)
            case Heartbeat():
                step = on_heartbeat(self.state, message.epoch, message.sequence, self.now_s)
            case Answer():
                step = on_snapshot(self.state, message.epoch, message.request, message.batch, self.now_s)
        return self._obey(before, step)

    def tick(self) -> int:
        return self._obey(self.state, on_tick(self.state, self.now_s))

    def _obey(self, before: FeedState, step: FeedStep) -> int:
        self.state = after = step.state
        apply(self.mirror, step.events)
        if after.epoch is not None:
            assert self.mirror == self.replica.history[after.epoch, after.sequence]
        if after.epoch == before.epoch:
            assert after.sequence >= before.sequence
        assert len(after.buffer) <= MAX_BUFFERED
        assert all(batch.sequence > after.sequence + 1 for batch in after.buffer)
        if step.ask:
            assert step.ask > before.request
        return step.ask


def answer(replica: Replica, request: int) -> Answer:
    return Answer(replica.epoch, request, snapshot(replica.sequence, replica.content))


@given(seed=st.integers(0, 2**32), steps=st.integers(1, 120), chaos=st.floats(0.0, 0.6))
def test_converges_whatever_the_network_does(seed: int, steps: int, chaos: float) -> None:
    rng = random.Random(seed)
    replica = Replica(rng)
    gateway = Gateway(replica)
    wire: list[Message] = []
    requests: list[int] = []

    def send(message: Message) -> None:
        wire.extend([message] * rng.choices([1, 0, 2], [1.0, chaos, chaos])[0])

    def ask(request: int) -> None:
        if request and rng.random() >= chaos:
            requests.append(request)

    for _ in range(steps):
        gateway.now_s += rng.random() * 0.2
        match rng.choices(["step", "beat", "serve", "restart"], [6, 2, 3, chaos])[0]:
            case "step":
                send(Batch(replica.epoch, replica.step()))
            case "beat":
                send(Heartbeat(replica.epoch, replica.sequence))
            case "serve" if requests:
                send(answer(replica, requests.pop(0)))
            case "restart":
                replica.restart()
        while wire and rng.random() < 0.7:
            first = 0 if rng.random() >= chaos else rng.randrange(len(wire))
            ask(gateway.receive(wire.pop(first)))
        ask(gateway.tick())

    # The network is well again: all that is still on the way arrives, in any order, then one heartbeat, and answers.
    rng.shuffle(wire)
    open_requests = [gateway.receive(message) for message in wire]
    open_requests.append(gateway.receive(Heartbeat(replica.epoch, replica.sequence)))
    for _ in range(3):
        for request in filter(None, open_requests):
            gateway.receive(answer(replica, request))
        gateway.now_s = max(gateway.now_s, min(next_tick_s(gateway.state), gateway.now_s + MAX_RESEND_S))
        open_requests = [gateway.tick()]
    assert not gateway.state.is_behind
    assert (gateway.state.epoch, gateway.state.sequence) == (replica.epoch, replica.sequence)
    assert gateway.mirror == replica.content


def in_sync(epoch: int = 1, sequence: int = 3, now_s: float = 0.0) -> FeedState:
    """A feed that has heard batch `sequence` and misses nothing; the next request may be made at once."""
    asked = on_tick(FeedState(), now_s)
    step = on_snapshot(asked.state, epoch, asked.ask, snapshot(sequence, {}), now_s)
    assert not step.state.is_behind
    return step.state._replace(due_s=now_s)


def test_a_new_feed_asks_at_once_and_keeps_what_comes_before_the_answer() -> None:
    asked = on_tick(FeedState(), 5.0)
    assert asked.ask == 1
    early = on_batch(asked.state, 1, stored(8, 80), 5.0)
    assert not early.events
    step = on_snapshot(early.state, 1, 1, snapshot(7, {70: GPU}), 5.1)
    assert list(step.events) == [*snapshot(7, {70: GPU}).events, *stored(8, 80).events]
    assert next_tick_s(step.state) == float("inf")


def test_a_gap_is_asked_for_at_once_and_again_ever_more_rarely() -> None:
    step = on_batch(in_sync(), 1, stored(5, 50), 1.0)
    assert step.ask
    asked_s = [1.0]
    for _ in range(8):
        due_s = next_tick_s(step.state)
        assert not on_tick(step.state, due_s - 0.01).ask
        step = on_tick(step.state, due_s)
        assert step.ask
        asked_s.append(due_s)
    waits_s = [after - before for before, after in itertools.pairwise(asked_s)]
    assert waits_s[0] == RESEND_S
    assert waits_s == sorted(waits_s)
    assert waits_s[-1] == MAX_RESEND_S


def test_a_stream_with_many_gaps_asks_no_faster_than_the_resend_time() -> None:
    state, asked_s = in_sync(), []
    for number in range(200):
        now_s = 1.0 + number * 0.01
        step = on_batch(state, 1, stored(5 + 2 * number, 1), now_s)
        if step.ask:
            asked_s.append(now_s)
            step = on_snapshot(step.state, 1, step.ask, snapshot(5 + 2 * number, {}), now_s)
        state = step.state
    assert 4 < len(asked_s) <= 2.0 / RESEND_S + 1


def test_an_answer_that_comes_in_parts_is_waited_for() -> None:
    state = on_batch(in_sync(), 1, stored(5, 50), 1.0).state
    for tenth in range(20):
        now_s = 1.0 + tenth * 0.1
        state = on_part(state, state.open_request, now_s)
        state = on_part(state, state.open_request - 1, now_s + 60.0)  # of an older answer
        assert not on_tick(state, now_s + 0.1).ask
    assert on_tick(state, now_s + RESEND_S).ask


def test_a_late_batch_closes_the_gap_without_a_snapshot() -> None:
    ahead = on_batch(in_sync(sequence=3), 1, stored(5, 50), 1.0)
    step = on_batch(ahead.state, 1, stored(4, 40), 1.1)
    assert list(step.events) == [*stored(4, 40).events, *stored(5, 50).events]
    assert not step.state.is_behind
    late = on_snapshot(step.state, 1, ahead.ask, snapshot(4, {40: GPU}), 1.2)
    assert not late.events
    assert late.state.sequence == 5


def test_batches_behind_a_second_gap_still_wait() -> None:
    state = in_sync(sequence=3)
    for sequence in (9, 5, 7, 7):
        state = on_batch(state, 1, stored(sequence, sequence), 1.0).state
    handed_on: list[KvEvent] = []
    for sequence in (4, 6, 8):
        step = on_batch(state, 1, stored(sequence, sequence), 1.0)
        state = step.state
        handed_on += step.events
    assert handed_on == [event for sequence in range(4, 10) for event in stored(sequence, sequence).events]
    assert not state.is_behind


def test_a_lost_last_batch_is_noticed_by_the_heartbeat() -> None:
    step = on_heartbeat(in_sync(sequence=3), 1, 4, 1.0)
    assert step.ask
    assert not step.events


def test_a_new_epoch_forgets_the_old_one_and_ignores_what_is_late_of_it() -> None:
    new = on_batch(in_sync(epoch=1, sequence=3), 2, stored(1, 10), 1.0)
    assert list(new.events) == [KvSnapshot((), ()), *stored(1, 10).events]
    late = on_batch(new.state, 1, stored(4, 40), 1.0)
    assert late.state.epoch == 2
    assert not late.events


@pytest.mark.parametrize("stale", [Heartbeat(1, 0), Heartbeat(1, 9), Batch(1, stored(1, 10))])
def test_an_epoch_left_for_a_stale_message_of_an_unknown_one_comes_back(stale: Heartbeat | Batch) -> None:
    state = in_sync(epoch=2, sequence=3)
    if isinstance(stale, Heartbeat):
        misled = on_heartbeat(state, stale.epoch, stale.sequence, 1.0)
    else:
        misled = on_batch(state, stale.epoch, stale.batch, 1.0)
    assert misled.state.epoch == 1
    assert misled.ask
    step = on_snapshot(misled.state, 2, misled.ask, snapshot(3, {7: GPU}), 1.1)
    assert (step.state.epoch, step.state.sequence) == (2, 3)
    assert not step.state.is_behind
    assert list(step.events) == [KvSnapshot((), ()), *snapshot(3, {7: GPU}).events]
    gap = on_batch(step.state, 2, stored(5, 50), 9.0)
    assert gap.ask
    assert list(on_batch(gap.state, 2, stored(4, 40), 9.0).events) == [*stored(4, 40).events, *stored(5, 50).events]


def test_a_late_answer_of_an_epoch_that_is_over_is_ignored() -> None:
    asked = on_batch(in_sync(epoch=1), 1, stored(9, 90), 1.0)
    new = on_heartbeat(asked.state, 2, 0, 1.1)
    late = on_snapshot(new.state, 1, asked.ask, snapshot(9, {90: GPU}), 1.2)
    assert late.state.epoch == 2
    assert not late.events


def test_the_buffer_is_bounded_and_keeps_the_newest() -> None:
    state = in_sync(sequence=3)
    for sequence in range(5, 5 + 2 * MAX_BUFFERED):
        state = on_batch(state, 1, stored(sequence, sequence), 1.0).state
    newest = 5 + 2 * MAX_BUFFERED - 1
    assert [batch.sequence for batch in state.buffer] == list(range(newest - MAX_BUFFERED + 1, newest + 1))
