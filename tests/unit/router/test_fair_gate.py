"""FairGate: nobody waits while there is room; who waits is let through in turn, told off, or forgotten."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import pytest
import pytest_asyncio

from serve.core.request import GenerateRequest, PrefillInfo
from serve.core.routing.fairness import FairnessSettings
from serve.core.routing.load import LoadReport
from serve.errors import Overloaded
from serve.router.board import RoutingBoard
from serve.router.fair_gate import FairGate
from serve.router.hints import RouteHints
from serve.router.trace import RouteTrace
from tests.unit.router.boards import Clock, announce, first_choice, holds, make_board, prompt, request


@dataclass
class Scene:
    """A gate, its board with one replica, and the sequences that came."""

    board: RoutingBoard
    clock: Clock
    gate: FairGate
    passed: list[str] = field(default_factory=list)
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    traces: dict[str, RouteTrace] = field(default_factory=dict)

    def send(self, name: str, tenant: str = "", tokens: list[int] | None = None, priority: int = 0) -> None:
        """Let a sequence come."""
        sequence = request(name, tokens if tokens is not None else prompt(len(self.tasks)), 16)
        self.traces[name] = announce(self.board, sequence, RouteHints(name, tenant=tenant, priority=priority))
        self.tasks[name] = asyncio.create_task(self._run(self.traces[name], sequence))

    async def _run(self, trace: RouteTrace, sequence: GenerateRequest) -> None:
        try:
            await self.gate.enter(trace, sequence)
            self.passed.append(sequence.request_id)
            first_choice(self.board, sequence)
        except BaseException:
            self.gate.leave(trace)
            raise

    def end(self, name: str, cached_tokens: int = 0, output_tokens: int = 1) -> None:
        """Let a sequence be over, as the desk tells it."""
        trace = self.traces[name]
        trace.prefill, trace.output_tokens = PrefillInfo(cached_tokens, 0.0, 0.0), output_tokens
        trace.ended_s = trace.routed_s = self.clock.now_s
        self.board.close(trace)
        self.gate.leave(trace)

    def has_room(self, waiting: int = 0) -> None:
        """Let the replica report that so many wait there."""
        self.board.roster.report("r1", LoadReport(total_blocks=1000, waiting=waiting))


def scene(**settings: float) -> Scene:
    board, _, clock = make_board("r1")
    limits = FairnessSettings.model_validate({"full_waiting": 2, "full_wait_s": 1e6, **settings})
    return Scene(board, clock, FairGate(board, limits, clock))


@pytest_asyncio.fixture
async def full() -> AsyncGenerator[Scene, None]:
    """A scene in which two sequences have taken all the room there is."""
    made = scene(max_queued=4, max_wait_s=10.0)
    made.send("first", "x")
    made.send("second", "y")
    await settle()
    assert made.passed == ["first", "second"]
    yield made
    for task in made.tasks.values():
        task.cancel()
    await asyncio.gather(*made.tasks.values(), return_exceptions=True)


async def settle() -> None:
    """Let every task run as far as it can."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_burst_that_arrives_at_once_takes_only_the_room_there_is() -> None:
    made = scene()
    made.send("other", "other")
    await settle()
    made.end("other")
    for number in range(5):
        made.send(str(number))
    await settle()
    made.passed.remove("other")
    assert made.passed == ["0", "1"]
    assert made.gate.queued() == {"default": 3}
    made.end("0")
    await settle()
    assert made.passed == ["0", "1", "2"]
    for task in made.tasks.values():
        task.cancel()
    await asyncio.gather(*made.tasks.values(), return_exceptions=True)


async def test_a_single_tenant_waits_at_the_replicas() -> None:
    made = scene()
    for number in range(100):
        made.send(str(number))
    await settle()
    assert len(made.passed) == 100


async def test_tenants_take_turns(full: Scene) -> None:
    for name in ("a1", "a2", "a3"):
        full.send(name, "a")
    full.send("b1", "b")
    await settle()
    for name in ("first", "second", "a1", "b1"):
        full.end(name)
        await settle()
    assert full.passed[2:] == ["a1", "b1", "a2", "a3"]


async def test_what_a_replica_holds_costs_nothing(full: Scene) -> None:
    held, new = prompt(1000, blocks=32), prompt(2000, blocks=32)
    holds(full.board, "r1", held)
    for number in range(2):
        full.send(f"a{number}", "a", new)
        full.send(f"b{number}", "b", held)
    await settle()
    for name in ("first", "second", "a0", "b0"):
        full.end(name)
        await settle()
    assert full.passed[2:] == ["a0", "b0", "b1", "a1"]


async def test_priorities_are_heard(full: Scene) -> None:
    full.send("later", priority=1)
    full.send("sooner", priority=-1)
    await settle()
    full.end("first")
    await settle()
    assert full.passed[2:] == ["sooner"]


async def test_somebody_looks_even_if_nothing_ends(full: Scene) -> None:
    full.send("waits")
    await settle()
    assert not full.tasks["waits"].done()
    full.board.close(full.traces["first"])
    full.board.close(full.traces["second"])
    full.has_room()
    await asyncio.wait_for(full.tasks["waits"], 5.0)
    assert sum(full.gate.waited_s.cumulated()[0][-1][1:]) == 1


async def test_a_full_queue_turns_away_the_newest_of_the_flood(full: Scene) -> None:
    for number in range(4):
        full.send(f"a{number}", "a")
    full.send("b", "b")
    await settle()
    with pytest.raises(Overloaded, match="4 sequences wait") as caught:
        await full.tasks["a3"]
    assert caught.value.retry_after_s >= 1.0
    full.send("a4", "a")
    await settle()
    with pytest.raises(Overloaded):
        await full.tasks["a4"]
    assert full.gate.turned_away == {"full": 2}
    assert full.gate.queued() == {"a": 3, "b": 1}


async def test_nobody_waits_for_ever(full: Scene) -> None:
    full.send("waits")
    await settle()
    full.clock.now_s += 10.0
    with pytest.raises(Overloaded, match="no replica of m had room for 10 s"):
        await asyncio.wait_for(full.tasks["waits"], 5.0)
    assert full.gate.turned_away == {"too_long": 1}


async def test_a_client_that_goes_away_leaves_its_place(full: Scene) -> None:
    full.send("leaves")
    full.send("stays")
    await settle()
    full.tasks["leaves"].cancel()
    await settle()
    assert sum(full.gate.queued().values()) == 1
    full.end("first")
    await settle()
    assert full.passed[2:] == ["stays"]


async def test_a_client_that_goes_away_when_its_turn_comes_takes_no_room(full: Scene) -> None:
    full.send("leaves")
    full.send("stays")
    await settle()
    full.tasks["leaves"].cancel()
    full.end("first")
    full.end("second")
    await settle()
    assert full.passed[2:] == ["stays"]


async def test_a_long_answer_is_paid_for_afterwards(full: Scene) -> None:
    for number in range(2):
        full.send(f"a{number}", "a", prompt(number, 8))
        full.send(f"b{number}", "b", prompt(10 + number, 8))
    await settle()
    for name in ("first", "second"):
        full.end(name)
        await settle()
    assert full.passed[2:] == ["a0", "b0"]
    full.send("b2", "b", prompt(12, 8))
    await settle()
    full.end("a0", output_tokens=5000)
    await settle()
    full.end("b0")
    await settle()
    assert full.passed[4:] == ["b1", "b2"]


async def test_without_replicas_nobody_waits_here() -> None:
    board, _, clock = make_board()
    gate = FairGate(board, FairnessSettings(), clock)
    sequence = request("one", [1, 2, 3])
    for _ in range(3):
        await gate.enter(announce(board, sequence), sequence)
