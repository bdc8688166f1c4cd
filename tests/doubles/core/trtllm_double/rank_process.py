"""One rank in a process of its own: what rank 0 and the others run, however they were started."""

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from trtllm_double import line, switches
from trtllm_double.engine_spec import EngineSpec

Address = str | tuple[str, int]
_CONNECT_S = 60.0


@dataclass(frozen=True)
class RankPlan:
    """What a rank's process is told.

    Attributes:
        parent: Unix socket on which the process of the LLM object listens: rank 0 has to share its node and its /tmp.
        collective: Where rank 0 meets the others; for rank 0 itself, where to listen.
        key: Of both channels.
        owner_pid: The process of the LLM object, if it is on the same node.
    """

    spec: EngineSpec
    rank: int
    parent: str
    collective: Address
    key: bytes
    owner_pid: int


def announce(plan: RankPlan) -> None:
    """Write this process's id where tests and the parent find it, and watch for the end of the owner."""
    folder = Path(plan.parent).parent
    if folder.is_dir():
        (folder / f"rank{plan.rank}.pid").write_text(str(os.getpid()))
    if shared := switches.text("PIDS"):
        Path(shared, str(os.getpid())).write_text(json.dumps({"rank": plan.rank, "owner": plan.owner_pid}))
    threading.Thread(
        target=_end_orphans, args=(plan.owner_pid, folder), name="double-orphan-guard", daemon=True
    ).start()


def _end_orphans(owner_pid: int, folder: Path) -> None:
    """End some time after the owner: real orphans stay for ever (reference 7.3), but tests must not leave any."""
    while Path(f"/proc/{owner_pid}").exists():
        time.sleep(0.5)
    shutil.rmtree(folder, ignore_errors=True)
    time.sleep(switches.number("ORPHAN_S", 120))
    os._exit(1)


def run_rank(plan: RankPlan) -> None:
    """Be a rank until told to stop."""
    line.choose(plan.spec.line)
    announce(plan)
    if plan.rank:
        follow(connect(plan.collective, plan.key))
    else:
        listener = Listener(plan.collective, authkey=plan.key)
        run_leader(plan, listener, Client(plan.parent, authkey=plan.key))


def connect(address: Address, key: bytes) -> Connection:
    """Connect to rank 0, which may not listen yet."""
    deadline = time.monotonic() + _CONNECT_S
    while True:
        try:
            connection: Connection = Client(address, authkey=key)
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return connection


def follow(leader: Connection) -> None:
    """Take part in each step of rank 0; hang for ever if it is lost, as a collective does."""
    while True:
        try:
            word = leader.recv_bytes()
            if word == b"quit":
                return
            leader.send_bytes(b"done")
        except (EOFError, OSError):
            switches.hang()


class Collective:
    """Rank 0's side of the steps that all ranks take together."""

    def __init__(self, listener: Listener, others: int) -> None:
        self._ranks = [listener.accept() for _ in range(others)]
        listener.close()

    def __call__(self) -> None:
        try:
            for rank in self._ranks:
                rank.send_bytes(b"step")
            for rank in self._ranks:
                rank.recv_bytes()
        except (EOFError, OSError):
            switches.hang()

    def quit(self) -> None:
        for rank in self._ranks:
            try:
                rank.send_bytes(b"quit")
            except OSError:
                continue


def run_leader(
    plan: RankPlan, listener: Listener, parent: Connection, on_start: Callable[[Any], None] = lambda _: None
) -> None:
    """Be rank 0; `on_start` is called with the step loop when it runs.

    Raises:
        Exception: What ended the step loop; whoever started this process hears of it.
    """
    from trtllm_double.engine_spec import make_core  # numpy, in this rank only
    from trtllm_double.rank_loop import RankLoop

    core = make_core(plan.spec)
    collective = Collective(listener, plan.spec.world_size - 1)
    lock, failed = threading.Lock(), list[BaseException]()

    def send(message: tuple[str, Any]) -> None:
        if message[0] == "fatal":
            failed.append(message[1])
        try:
            with lock:
                parent.send(message)
        except OSError:
            switches.hang()  # the process of the LLM object is gone, and nobody told this one

    loop = RankLoop(core, send, collective)
    send(("ready", {"vocab_size": core.model.vocab_size, "capacity": core.capacity()}))
    loop.start()
    on_start(loop)
    if _serve(parent, loop, send, failed):
        loop.post("stop")
        loop.join()
        collective.quit()
        parent.close()
    elif failed:
        raise failed[0]
    else:
        switches.hang()


def _serve(parent: Connection, loop: Any, send: Callable[[tuple[str, Any]], None], failed: list[BaseException]) -> bool:
    """Obey the parent; return whether it asked for the end."""
    while True:
        try:
            if not parent.poll(0.05):
                if failed:
                    return False
                continue
            kind, value = parent.recv()
        except (EOFError, OSError):
            return False
        if kind == "stop":
            return True
        if kind == "fetch":
            number, what = value
            send(("reply", (number, loop.take(what))))
        else:
            loop.post(kind, value)


def main() -> None:
    """Entry point of a plain process: the plan comes on standard input."""
    import pickle

    run_rank(pickle.load(sys.stdin.buffer))


if __name__ == "__main__":
    main()
