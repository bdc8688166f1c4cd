"""ProxyExecutor: the ranks are processes; rank 0 talks over a unix socket (GenerationExecutorProxy, reference 4.1)."""

import itertools
import os
import queue
import secrets
import shutil
import tempfile
import threading
import time
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

from trtllm_double import line
from trtllm_double.engine_spec import EngineSpec
from trtllm_double.errors import EngineDeadError
from trtllm_double.executor import Executor
from trtllm_double.rank_process import RankPlan
from trtllm_double.spawners import Spawner

_START_S = 120.0
_WATCH_S = 0.1
_DEAD_SHUTDOWN_S = 5.0  # reference 2.5, PR 16312: bounded in the newest line


class ChannelExecutor(Executor):
    """An executor whose rank 0 is at the other end of a connection."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="trtllm-double-"))
        self.key = secrets.token_bytes(16)
        self._listener = Listener(str(self.folder / "parent.sock"), authkey=self.key)
        self._connection: Connection | None = None
        self._sending = threading.Lock()
        self._replies: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._numbers = itertools.count()
        self._fetching = threading.Lock()

    def plan(self, spec: EngineSpec, rank: int, collective: Any) -> RankPlan:
        return RankPlan(spec, rank, str(self.folder / "parent.sock"), collective, self.key, os.getpid())

    def accept(self, failure: Any) -> None:
        """Wait for rank 0; `failure()` returns an exception if there will be none."""
        accepted: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        threading.Thread(target=lambda: accepted.put(self._listener.accept()), daemon=True).start()
        deadline = time.monotonic() + _START_S
        while True:
            try:
                connection = accepted.get(timeout=0.02)
                break
            except queue.Empty:
                self._check_start(failure, deadline)
        while not connection.poll(0.05):
            self._check_start(failure, deadline)
        try:
            _, ready = connection.recv()
        except (EOFError, OSError):
            while True:  # until its process has ended, too
                self._check_start(failure, deadline)
                time.sleep(0.02)
        self.vocab_size, self.capacity = ready["vocab_size"], ready["capacity"]
        self._connection = connection
        threading.Thread(target=self._receive, name="double-dispatch", daemon=True).start()

    def _check_start(self, failure: Any, deadline: float) -> None:
        error = failure()
        if error is not None:
            self.give_up()
            raise RuntimeError("Executor worker returned error") from error
        if self.lost() is not None or time.monotonic() > deadline:
            self.give_up()
            raise RuntimeError("Executor worker died during initialization")

    def pids(self) -> dict[int, int]:
        """Return rank -> process id, of ranks that have announced themselves on this node."""
        found = {}
        for file in self.folder.glob("rank*.pid"):
            content = file.read_text()
            if content:
                found[int(file.stem.removeprefix("rank"))] = int(content)
        return found

    def lost(self) -> str | None:
        """Return what is wrong with a rank's process, if one is dead."""
        for rank, pid in sorted(self.pids().items()):
            if not is_alive(pid):
                return f"MPI worker of rank {rank} (pid {pid}) died"
        return None

    def send(self, kind: str, value: Any = None) -> None:
        connection = self._connection
        if connection is None:
            return
        try:
            with self._sending:
                connection.send((kind, value))
        except OSError:
            pass  # rank 0 is gone: 1.2.x does not notice

    def fetch(self, kind: str) -> list[Any]:
        with self._fetching:
            number = next(self._numbers)
            self.send("fetch", (number, kind))
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline and self._fatal is None:
                try:
                    answered, data = self._replies.get(timeout=0.05)
                except queue.Empty:
                    continue
                if answered == number:
                    return list(data)
        return []

    def give_up(self) -> None:
        """Leave nothing of a start that failed."""
        self.clean_up()

    def clean_up(self) -> None:
        self._listener.close()
        if self._connection is not None:
            self._connection.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _receive(self) -> None:
        assert self._connection is not None
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError, TypeError):
                return
            if message[0] == "reply":
                self._replies.put(message[1])
            else:
                self.receive(message)


class ProxyExecutor(ChannelExecutor):
    """Ranks that a spawner starts on this node."""

    def __init__(self, spec: EngineSpec, spawner: Spawner) -> None:
        super().__init__()
        self._spawner = spawner
        self._stopping = threading.Event()
        collective = str(self.folder / "ranks.sock")
        spawner.start([self.plan(spec, rank, collective) for rank in range(spec.world_size)])
        self.accept(spawner.failure)
        threading.Thread(target=self._watch, name="double-worker-monitor", daemon=True).start()

    def stop(self) -> None:
        self._stopping.set()
        self.send("stop")
        # 1.2.x waits for its workers without a limit, also for those that hang (reference 7.3).
        self._spawner.wait(_DEAD_SHUTDOWN_S if line.current().notices_death else None)
        self.clean_up()

    def give_up(self) -> None:
        self._spawner.wait(1.0)
        self.clean_up()

    def _watch(self) -> None:
        """Notice what an MPI future tells in both lines, and dead processes in the newest one."""
        while not self._stopping.wait(_WATCH_S):
            error = self._spawner.failure()
            if error is None and line.current().notices_death and (lost := self.lost()) is not None:
                error = EngineDeadError(lost)
            if error is not None and self._fatal is None:
                self.on_fatal(error)
                return


def is_alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")
