"""WorkerGroup around a simulated engine and real processes."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from serve.core.group_state import GroupState, RankLost, Stalled, Suspected, replay
from serve.core.request import GenerateRequest, SamplingParams, TokenDelta, pack_tokens
from serve.engines.protocol import EngineStats
from serve.engines.simulated.engine import SimulatedEngine
from serve.engines.simulated.faults import Fault
from serve.errors import ConfigError, EngineDead, RequestError
from serve.workers.group import WorkerGroup
from serve.workers.group_settings import GroupSettings
from serve.workers.processes import marked_processes, start_ticks
from tests.unit.workers.fake_launcher import FakeLauncher, slow_settings

QUICK = GroupSettings(heartbeat_s=0.05, heartbeat_limit_s=0.2, end_grace_s=0.5, lease_s=1.0)


def request(name: str = "r", max_tokens: int = 10_000) -> GenerateRequest:
    return GenerateRequest(name, "m", pack_tokens(range(40)), SamplingParams(max_tokens=max_tokens))


def processes_of(group: WorkerGroup) -> dict[int, object]:
    return dict(marked_processes(lambda mark: mark.group == group.id))


@asynccontextmanager
async def running(launcher: FakeLauncher, settings: GroupSettings = QUICK) -> AsyncIterator[WorkerGroup]:
    group = WorkerGroup(launcher, settings)
    try:
        await group.start()
        yield group
    finally:
        await group.stop()
        launcher.collect()
        assert replay(group.log)[-1].state is GroupState.STOPPED
        assert not processes_of(group)


async def read(group: WorkerGroup, into: list[TokenDelta], name: str = "r") -> None:
    async for delta in group.generate(request(name)):
        into.append(delta)  # noqa: PERF401  # looked at while it goes on


async def first_delta(deltas: list[TokenDelta]) -> None:
    while not deltas:  # noqa: ASYNC110  # nothing announces it but the list
        await asyncio.sleep(0.005)


async def test_it_serves_as_its_engine_does() -> None:
    async with running(FakeLauncher()) as group:
        deltas = [delta async for delta in group.generate(request(max_tokens=5))]
        assert sum(len(delta.token_ids) for delta in deltas) == 5
        assert group.info.device == "simulated"
        assert group.stats().generated_tokens == 5
        group.check_health()
        with pytest.raises(RequestError, match="empty"):
            await anext(group.generate(GenerateRequest("e", "m", b"")))
        assert group.state is GroupState.READY
        assert len(processes_of(group)) == 4  # two ranks, each with a child


async def test_a_killed_rank_cuts_every_stream_and_leaves_no_process() -> None:
    launcher = FakeLauncher()
    async with running(launcher) as group:
        received: list[list[TokenDelta]] = [[] for _ in range(8)]
        readers = [asyncio.create_task(read(group, into, str(i))) for i, into in enumerate(received)]
        for into in received:
            await first_delta(into)
        launcher.signal(1, signal.SIGKILL)
        results = await asyncio.gather(*readers, return_exceptions=True)
        assert all(isinstance(result, EngineDead) and "rank 1" in str(result) for result in results), results
        with pytest.raises(EngineDead, match="rank 1"):
            group.check_health()
        with pytest.raises(EngineDead, match="rank 1"):
            await anext(group.generate(request("late")))
        await group.wait_until_stopped()
        assert not processes_of(group)
        assert group.state is GroupState.STOPPED
        assert launcher.graces_s == [0.0]


async def test_a_stopped_rank_is_suspected_and_then_lost() -> None:
    launcher = FakeLauncher()
    async with running(launcher) as group:
        launcher.signal(0, signal.SIGSTOP)
        await group.wait_until_stopped()
        events = [entry.event for entry in group.log]
        assert any(isinstance(event, Suspected) for event in events)
        lost = next(event for event in events if isinstance(event, RankLost))
        assert "no sign of life" in lost.reason
        assert not processes_of(group)


async def test_a_rank_that_goes_on_in_time_is_forgiven() -> None:
    launcher = FakeLauncher()
    async with running(launcher, QUICK.model_copy(update={"heartbeat_limit_s": 3.0})) as group:
        launcher.signal(1, signal.SIGSTOP)
        await until_state(group, GroupState.DEGRADED)
        launcher.signal(1, signal.SIGCONT)
        await until_state(group, GroupState.READY)
        group.check_health()


async def until_state(group: WorkerGroup, state: GroupState) -> None:
    while group.state is not state:  # noqa: ASYNC110  # nothing announces it but the state
        await asyncio.sleep(0.02)


async def test_an_engine_that_hangs_is_found_by_its_silence() -> None:
    engine = SimulatedEngine(slow_settings())
    settings = QUICK.model_copy(update={"token_limit_s": 0.3, "first_token_limit_s": 0.3})
    async with running(FakeLauncher(engine), settings) as group:
        deltas: list[TokenDelta] = []
        reader = asyncio.create_task(read(group, deltas))
        await first_delta(deltas)
        engine.inject(Fault(kind="hang"))
        with pytest.raises(EngineDead, match="no token for"):
            await reader
        await group.wait_until_stopped()
        assert any(isinstance(entry.event, Stalled) for entry in group.log)


async def test_an_engine_that_says_it_is_dead_fails_the_group() -> None:
    engine = SimulatedEngine(slow_settings())
    async with running(FakeLauncher(engine)) as group:
        engine.inject(Fault(kind="die"))
        await group.wait_until_stopped()  # noticed without any request
        assert "a rank was lost" in group.reason


class Unaccountable(SimulatedEngine):
    """An engine whose statistics fail once it is told so."""

    is_broken = False

    def stats(self) -> EngineStats:
        if self.is_broken:
            raise ZeroDivisionError("no steps")
        return super().stats()


async def test_a_watch_that_fails_ends_the_group_instead_of_looking_no_more() -> None:
    engine = Unaccountable(slow_settings())
    async with running(FakeLauncher(engine)) as group:
        engine.is_broken = True
        await group.wait_until_stopped()
        assert "the watch over the group failed: ZeroDivisionError: no steps" in group.reason


async def test_a_slow_reader_is_no_stall() -> None:
    settings = QUICK.model_copy(update={"token_limit_s": 0.2, "first_token_limit_s": 0.2})
    async with running(FakeLauncher(), settings) as group:
        stream = group.generate(request())
        await anext(stream)
        await asyncio.sleep(0.6)  # three times the limit; the time itself is what is tested
        await anext(stream)
        assert group.state is GroupState.READY
        await stream.aclose()


@pytest.mark.parametrize("error", [ConfigError("no such model"), RuntimeError("bug")])
async def test_a_launch_that_fails_leaves_nothing_and_says_why(error: Exception) -> None:
    launcher = FakeLauncher(error=error)
    group = WorkerGroup(launcher, QUICK)
    with pytest.raises(type(error), match=str(error)):
        await group.start()
    assert group.state is GroupState.STOPPED
    assert not processes_of(group)
    launcher.collect()
    with pytest.raises(EngineDead, match=str(error)):
        await group.start()


async def test_a_launch_that_takes_too_long_fails() -> None:
    launcher = FakeLauncher(hang=True)
    group = WorkerGroup(launcher, QUICK.model_copy(update={"start_limit_s": 0.5}))
    with pytest.raises(EngineDead, match="start_limit_s"):
        await group.start()
    assert not processes_of(group)
    launcher.collect()


async def test_a_rank_that_dies_while_it_starts_ends_the_start() -> None:
    launcher = FakeLauncher(hang=True)
    group = WorkerGroup(launcher, QUICK)
    starting = asyncio.create_task(group.start())
    while len(launcher.processes) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    launcher.signal(1, signal.SIGKILL)
    with pytest.raises(EngineDead, match="rank 1"):
        await starting
    launcher.collect()


async def test_stop_while_it_starts() -> None:
    launcher = FakeLauncher(hang=True)
    group = WorkerGroup(launcher, QUICK)
    starting = asyncio.create_task(group.start())
    while not launcher.processes:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await group.stop()
    with pytest.raises(EngineDead, match="asked to stop"):
        await starting
    launcher.collect()
    assert not processes_of(group)


async def test_stop_before_anything_was_launched() -> None:
    launcher = FakeLauncher()
    group = WorkerGroup(launcher, QUICK)
    starting = asyncio.create_task(group.start())
    await asyncio.sleep(0)  # it looks for what dead groups have left
    await group.stop()
    with pytest.raises(EngineDead, match="asked to stop"):
        await starting
    assert not launcher.processes


async def test_a_cancelled_start_leaves_nothing() -> None:
    launcher = FakeLauncher(hang=True)
    group = WorkerGroup(launcher, QUICK)
    starting = asyncio.create_task(group.start())
    while not launcher.processes:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await group.wait_until_stopped()
    launcher.collect()
    assert not processes_of(group)


async def test_stop_before_start() -> None:
    group = WorkerGroup(FakeLauncher(), QUICK)
    await group.stop()
    await group.stop()
    with pytest.raises(EngineDead):
        group.check_health()


async def test_a_cancelled_reader_is_cancelled_not_told_of_death() -> None:
    async with running(FakeLauncher()) as group:
        deltas: list[TokenDelta] = []
        reader = asyncio.create_task(read(group, deltas))
        await first_delta(deltas)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert group.stats().running == 0
        assert group.state is GroupState.READY


async def test_what_dead_groups_left_is_killed_by_the_next() -> None:
    """The child of a process that marked itself as owner, and was killed together with its reaper."""
    orphan = await _leave_orphan()
    async with running(FakeLauncher()):
        assert start_ticks(orphan) is None


async def _leave_orphan() -> int:
    program = (
        "import os, subprocess, sys\n"
        "from serve.workers.processes import GROUP_VARIABLE, GroupMark\n"
        "os.environ[GROUP_VARIABLE] = GroupMark.of_this_process('gone').to_text()\n"
        "line = [sys.executable, '-S', '-c', 'import time; time.sleep(600)']\n"
        "child = subprocess.Popen(line, start_new_session=True, stdout=subprocess.DEVNULL)\n"
        "print(child.pid, flush=True)\n"
        "os._exit(0)\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    return int(output)
