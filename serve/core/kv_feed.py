"""KvFeed: one replica's stream of KV events as a gateway hears it, made whole again.

Batches may be lost, come twice, late or in another order, and the engine may restart in between. What is handed on is
always the content of the cache at one moment: that of batch `sequence` in engine start `epoch`, never an older one
after a newer one. Where a batch is missing, what is known stays as it is, later batches wait here, and a snapshot is
asked for; it closes the gap, whether or not the missing batch still comes.

Use, by a shell that owns a socket: start with `FeedState()`; give each message to its `on_...` function, and `on_tick`
at `next_tick_s(state)`; each time keep `step.state`, apply `step.events` in order, and send a request for a snapshot
with the number `step.ask` unless it is 0.

An epoch is a random number, so of two of them nothing says which is newer. Epochs that were left are remembered, and
what still arrives from them is ignored. A new one is believed at once, but a snapshot is asked for to confirm it: the
answer to the latest request came from the living engine, after all that had been heard before, and can bring back an
epoch that was left for a message which had been on its way for very long.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from serve.core.kv_events import KvEvent, KvEventBatch, KvSnapshot

RESEND_S = 0.25  # wait for an answer before asking again, at first; it doubles each time
MAX_RESEND_S = 1.0  # so that two seconds after the network is well again, all is known
MAX_BUFFERED = 512  # batches; a new one pushes out the oldest, which the snapshot will most likely cover
_REMEMBERED_EPOCHS = 16
_FORGET = KvSnapshot((), ())


class FeedState(NamedTuple):
    """Where one replica's stream is.

    Attributes:
        epoch: The engine start that is known; None before the first message.
        sequence: Number of the last batch handed on. 0 is the empty cache with which an engine starts.
        heard: Highest number that the epoch is known to have reached.
        buffer: Batches that came after a gap, by number, each once.
        left: Epochs that are over, the oldest first.
        confirmed: Whether a request that was made in this epoch has been answered by it.
        request: Number of the last request for a snapshot.
        open_request: The same, if it was made in this epoch and is still needed; else 0.
        attempts: Requests since nothing was missing.
        due_s: No request before this time.
    """

    epoch: int | None = None
    sequence: int = 0
    heard: int = 0
    buffer: tuple[KvEventBatch, ...] = ()
    left: tuple[int, ...] = ()
    confirmed: bool = False
    request: int = 0
    open_request: int = 0
    attempts: int = 0
    due_s: float = -math.inf

    @property
    def is_behind(self) -> bool:
        """Whether a snapshot is needed."""
        return self.heard > self.sequence or not self.confirmed


class FeedStep(NamedTuple):
    """What follows from one input.

    Attributes:
        state: The state from now on.
        events: To apply now, in order. The first is an empty snapshot if the engine was started anew.
        ask: Number of a request for a snapshot to send now; 0: none.
    """

    state: FeedState
    events: Sequence[KvEvent] = ()
    ask: int = 0


def on_batch(state: FeedState, epoch: int, batch: KvEventBatch, now_s: float) -> FeedStep:
    """A batch was published."""
    if epoch == state.epoch and batch.sequence == state.sequence + 1 and state.heard == state.sequence:
        return FeedStep(state._replace(sequence=batch.sequence, heard=batch.sequence), batch.events)
    if epoch in state.left:
        return on_tick(state, now_s)
    state, forgotten = _enter(state, epoch)
    state, events = _take(state, batch)
    return _ask(state, [*forgotten, *events], now_s)


def on_snapshot(state: FeedState, epoch: int, request: int, batch: KvEventBatch, now_s: float) -> FeedStep:
    """A request for a snapshot was answered.

    Args:
        state: Where the stream is.
        epoch: Of the engine that answered.
        request: Number of the request.
        batch: Begins with a snapshot, and has the number of the last batch that this covers.
        now_s: The time.
    """
    if request != state.open_request:
        return on_batch(state, epoch, batch, now_s)
    left = tuple(one for one in state.left if one != epoch)
    state, forgotten = _enter(state._replace(left=left), epoch)
    state, events = _take(state._replace(confirmed=True), batch)
    return _ask(state, [*forgotten, *events], now_s)


def on_part(state: FeedState, request: int, now_s: float) -> FeedState:
    """A part of the answer to a request has arrived: its other parts are waited for before it is asked again."""
    if request != state.open_request:
        return state
    return state._replace(due_s=max(state.due_s, now_s + RESEND_S))


def on_heartbeat(state: FeedState, epoch: int, sequence: int, now_s: float) -> FeedStep:
    """A message of another kind said that it was sent after batch `sequence`."""
    if epoch == state.epoch and sequence <= state.heard == state.sequence:
        return FeedStep(state)
    if epoch in state.left:
        return on_tick(state, now_s)
    state, forgotten = _enter(state, epoch)
    return _ask(state._replace(heard=max(state.heard, sequence)), forgotten, now_s)


def on_tick(state: FeedState, now_s: float) -> FeedStep:
    """Time has passed."""
    return _ask(state, (), now_s)


def next_tick_s(state: FeedState) -> float:
    """Return when `on_tick` has to be called if nothing comes before; `inf`: not at all."""
    return state.due_s if state.is_behind else math.inf


def _enter(state: FeedState, epoch: int) -> tuple[FeedState, tuple[KvEvent, ...]]:
    """Go over to an epoch, unless it is the present one."""
    if epoch == state.epoch:
        return state, ()
    if state.epoch is None:
        return state._replace(epoch=epoch), ()
    left = (*state.left, state.epoch)[-_REMEMBERED_EPOCHS:]
    return FeedState(epoch=epoch, left=left, request=state.request), (_FORGET,)


def _take(state: FeedState, batch: KvEventBatch) -> tuple[FeedState, list[KvEvent]]:
    """Hand on a batch and those that waited for it, or let it wait."""
    if batch.sequence <= state.sequence:
        return state, []
    state = state._replace(heard=max(state.heard, batch.sequence))
    if batch.sequence != state.sequence + 1 and not isinstance(batch.events[0], KvSnapshot):
        return state._replace(buffer=_insert(state.buffer, batch)), []
    events, sequence = list(batch.events), batch.sequence
    for later in state.buffer:
        if later.sequence == sequence + 1:
            events += later.events
            sequence = later.sequence
    rest = tuple(later for later in state.buffer if later.sequence > sequence)
    return state._replace(sequence=sequence, buffer=rest), events


def _insert(buffer: tuple[KvEventBatch, ...], batch: KvEventBatch) -> tuple[KvEventBatch, ...]:
    before = tuple(other for other in buffer if other.sequence < batch.sequence)
    after = tuple(other for other in buffer if other.sequence > batch.sequence)
    return (*before, batch, *after)[-MAX_BUFFERED:]


def _ask(state: FeedState, events: Sequence[KvEvent], now_s: float) -> FeedStep:
    """Ask for a snapshot if something is missing and it is time to."""
    if not state.is_behind:
        # A stream that loses something again and again asks no faster than one that gets no answer.
        due_s = min(state.due_s, now_s + RESEND_S)
        return FeedStep(state._replace(open_request=0, attempts=0, due_s=due_s), events)
    if now_s < state.due_s:
        return FeedStep(state, events)
    request = state.request + 1
    due_s = now_s + min(MAX_RESEND_S, RESEND_S * 2**state.attempts)
    state = state._replace(request=request, open_request=request, attempts=min(state.attempts + 1, 8), due_s=due_s)
    return FeedStep(state, events, request)
