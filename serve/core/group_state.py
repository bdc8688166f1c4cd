"""State of a worker group: it starts, serves, and ends as one.

`decide(group, event)` is pure: it returns the next state and what has to be done. All there is to know about which
event leads where is `TRANSITIONS`; docs/worker-groups.md draws it. Events are few (heartbeats are judged before, by
`serve.core.heartbeat` and `serve.core.watchdog`), so that all of them can be logged and replayed.
"""

from collections.abc import Iterable, Mapping
from enum import StrEnum

import msgspec


class GroupState(StrEnum):
    """Where a group is in its life."""

    STARTING = "starting"  # ranks come to life and load the model
    READY = "ready"
    DEGRADED = "degraded"  # it serves, but a rank is late, or no token came for longer than usual
    DRAINING = "draining"  # asked to stop: ranks end in order
    FAILED = "failed"  # lost a rank, or its progress: streams are cut, ranks are killed, memory is waited for
    STOPPED = "stopped"  # no process is left, and its GPU memory is free


class Launched(msgspec.Struct, frozen=True, tag=True):
    """The engine can generate."""


class LaunchFailed(msgspec.Struct, frozen=True, tag=True):
    """The engine did not start, or took too long."""

    reason: str


class RankStarted(msgspec.Struct, frozen=True, tag=True):
    """A rank has a process; told for the log."""

    rank: int
    node_id: str
    pid: int


class RankLost(msgspec.Struct, frozen=True, tag=True):
    """A rank died, or was silent for too long."""

    rank: int
    reason: str


class EngineLost(msgspec.Struct, frozen=True, tag=True):
    """The engine says itself that it cannot go on."""

    reason: str


class Stalled(msgspec.Struct, frozen=True, tag=True):
    """Requests are running, every rank may be alive, and yet no token came in time."""

    reason: str


class Suspected(msgspec.Struct, frozen=True, tag=True):
    """Half of the time is over after which a rank counts as lost, or the engine as stalled."""

    reason: str


class Cleared(msgspec.Struct, frozen=True, tag=True):
    """All ranks are on time again, and tokens flow."""


class StopRequested(msgspec.Struct, frozen=True, tag=True):
    """Whoever owns the group wants it to end."""


class RanksEnded(msgspec.Struct, frozen=True, tag=True):
    """No process of the group is alive, or none that could be killed: `survivors` names those."""

    survivors: tuple[str, ...] = ()


class MemoryReleased(msgspec.Struct, frozen=True, tag=True):
    """The GPUs are as they were before the start; `held` names those that are not after the time allowed."""

    held: tuple[str, ...] = ()


Event = (
    Launched
    | LaunchFailed
    | RankStarted
    | RankLost
    | EngineLost
    | Stalled
    | Suspected
    | Cleared
    | StopRequested
    | RanksEnded
    | MemoryReleased
)


class FailStreams(msgspec.Struct, frozen=True, tag=True):
    """Let every stream raise `EngineDead` now, and refuse new ones."""

    reason: str


class EndRanks(msgspec.Struct, frozen=True, tag=True):
    """End every process of the group; answered by `RanksEnded`.

    Attributes:
        politely: Let them end by themselves first.
    """

    politely: bool


class AwaitMemory(msgspec.Struct, frozen=True, tag=True):
    """Wait until the GPUs' memory is free; answered by `MemoryReleased`."""


class Release(msgspec.Struct, frozen=True, tag=True):
    """The group is over: let go of everything that guarded it."""


Action = FailStreams | EndRanks | AwaitMemory | Release


class Group(msgspec.Struct, frozen=True):
    """All that a group remembers.

    Attributes:
        state: Where it is.
        reason: Why it left `ready`, in words for the operator; empty until then.
        ranks_ended: Whether its processes are gone, while it is draining or failed.
    """

    state: GroupState = GroupState.STARTING
    reason: str = ""
    ranks_ended: bool = False

    @property
    def serves(self) -> bool:
        """Whether it takes requests."""
        return self.state in (GroupState.READY, GroupState.DEGRADED)


class Steps(StrEnum):
    """What a transition asks for, in order; `_actions` turns it into actions."""

    FAIL = "cut streams, kill ranks"
    END = "cut streams, end ranks politely"
    MEMORY = "wait for GPU memory"
    RELEASE = "release"
    NOTHING = ""


_S = GroupState
_FAILURES: tuple[type[Event], ...] = (RankLost, EngineLost, Stalled)

# (state, event) -> (next state, what is to be done). A pair that is not here changes nothing: what is lost while the
# group ends, for instance, is lost on purpose.
TRANSITIONS: Mapping[tuple[GroupState, type[Event]], tuple[GroupState, Steps]] = {
    (_S.STARTING, Launched): (_S.READY, Steps.NOTHING),
    (_S.STARTING, LaunchFailed): (_S.FAILED, Steps.FAIL),
    (_S.STARTING, RankLost): (_S.FAILED, Steps.FAIL),
    (_S.STARTING, EngineLost): (_S.FAILED, Steps.FAIL),
    (_S.STARTING, StopRequested): (_S.DRAINING, Steps.END),
    (_S.READY, Suspected): (_S.DEGRADED, Steps.NOTHING),
    (_S.READY, StopRequested): (_S.DRAINING, Steps.END),
    **{(_S.READY, failure): (_S.FAILED, Steps.FAIL) for failure in _FAILURES},
    (_S.DEGRADED, Cleared): (_S.READY, Steps.NOTHING),
    (_S.DEGRADED, StopRequested): (_S.DRAINING, Steps.END),
    **{(_S.DEGRADED, failure): (_S.FAILED, Steps.FAIL) for failure in _FAILURES},
    (_S.DRAINING, RanksEnded): (_S.DRAINING, Steps.MEMORY),
    (_S.DRAINING, MemoryReleased): (_S.STOPPED, Steps.RELEASE),
    (_S.FAILED, RanksEnded): (_S.FAILED, Steps.MEMORY),
    (_S.FAILED, MemoryReleased): (_S.STOPPED, Steps.RELEASE),
}


def decide(group: Group, event: Event) -> tuple[Group, tuple[Action, ...]]:
    """Return what becomes of a group by an event, and what has to be done then, in order."""
    if isinstance(event, RanksEnded) and group.ranks_ended:
        return group, ()  # told twice
    if isinstance(event, MemoryReleased) and not group.ranks_ended:
        return group, ()  # memory says nothing while processes live
    found = TRANSITIONS.get((group.state, type(event)))
    if found is None:
        return group, ()
    state, steps = found
    reason = group.reason
    if state in (_S.DEGRADED, _S.FAILED, _S.DRAINING) and state is not group.state:
        reason = _reason(event)
    elif state is _S.READY:
        reason = ""
    after = Group(state, reason, group.ranks_ended or isinstance(event, RanksEnded))
    return after, _actions(steps, after)


class LogEntry(msgspec.Struct, frozen=True):
    """One event, and what it led to.

    Attributes:
        at_s: `time.monotonic()` when it was decided.
        before, after: State of the group.
        event: What happened.
        actions: What was done.
    """

    at_s: float
    before: Group
    event: Event
    after: Group
    actions: tuple[Action, ...] = ()


def replay(entries: Iterable[LogEntry]) -> list[Group]:
    """Decide again what a log tells, and return the states.

    Raises:
        ValueError: The log was not written by this decision, or entries are missing; names the first that differs.
    """
    states: list[Group] = []
    for number, entry in enumerate(entries):
        if states and entry.before != states[-1]:
            raise ValueError(f"entry {number}: begins at {entry.before}, but the one before ended at {states[-1]}")
        after, actions = decide(entry.before, entry.event)
        if (after, actions) != (entry.after, entry.actions):
            raise ValueError(f"entry {number}: {entry.event} led to {entry.after} then, and to {after} now")
        states.append(after)
    return states


def to_line(entry: LogEntry) -> str:
    """Return an entry as one line of JSON."""
    return msgspec.json.encode(entry).decode()


def from_line(line: str) -> LogEntry:
    """Read an entry that `to_line` wrote.

    Raises:
        ValueError: It is none.
    """
    return msgspec.json.decode(line, type=LogEntry)


def _reason(event: Event) -> str:
    match event:
        case RankLost(rank, reason):
            return f"rank {rank}: {reason}"
        case LaunchFailed(reason) | EngineLost(reason) | Stalled(reason) | Suspected(reason):
            return reason
        case _:
            return "the group was asked to stop"


def _actions(steps: Steps, group: Group) -> tuple[Action, ...]:
    match steps:
        case Steps.FAIL:
            return FailStreams(group.reason), EndRanks(politely=False)
        case Steps.END:
            return FailStreams(group.reason), EndRanks(politely=True)
        case Steps.MEMORY:
            return (AwaitMemory(),)
        case Steps.RELEASE:
            return (Release(),)
        case Steps.NOTHING:
            return ()
