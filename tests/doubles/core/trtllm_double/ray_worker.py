"""RayWorkerWrapper: the actor that is one rank."""

import os
import threading
from multiprocessing.connection import Client, Listener
from typing import Any

import ray

from trtllm_double import line, switches
from trtllm_double.rank_process import RankPlan, announce, connect, follow, run_leader

NODE_VARIABLE = "TRTLLM_DOUBLE_NODE"
# Ray pickles the class by reference to this module, whose package finds this folder: PYTHONPATH is all it needs.
WORKER_MODULE = (
    "tensorrt_llm.executor.ray.gpu_worker" if line.current().is_newest else "tensorrt_llm.executor.ray_gpu_worker"
)


class RayWorkerWrapper:
    """One rank. Calls come one at a time, so that the engine runs in threads of its own."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size
        self._failed: list[BaseException] = []
        self._loop: Any = None
        self._started = threading.Event()
        self._plan: RankPlan | None = None
        self._listener: Listener | None = None
        self._thread: threading.Thread | None = None
        self.gpu = self._choose_gpu()

    def _choose_gpu(self) -> int:
        """Reference 4.2, step 5: numbers only, and a mask is looked through if it is there and not empty."""
        ids = ray.get_gpu_ids()
        physical = int(ids[0])
        mask = os.environ.get("CUDA_VISIBLE_DEVICES")
        local = [int(part) for part in mask.split(",")].index(physical) if mask else physical
        if local >= switches.device_count():
            raise RuntimeError(f"CUDA error: invalid device ordinal {local} (of {switches.device_count()})")
        return local

    def ready(self) -> int:
        return os.getpid()

    def open_store(self, plan: RankPlan) -> tuple[str, int]:
        """Listen for the other ranks, on the address of the LLM object's node and a port of the system's choice.

        Raises:
            OSError: This is another node: rank 0 has to be on that of the LLM object (reference 4.2, step 3).
        """
        line.choose(plan.spec.line)
        here, owner = ray.get_runtime_context().get_node_id(), os.environ["MASTER_ADDR"]
        # Nodes that share a machine share its address and /tmp, which real ones do not: nodes are compared.
        if here != os.environ[NODE_VARIABLE] or not os.path.exists(plan.parent):
            raise OSError(f"rank 0 is on node {here}, and cannot bind the address {owner} of the LLM object's node")
        self._listener = Listener((owner, 0), authkey=plan.key, backlog=max(1, plan.spec.world_size))
        self._plan = plan
        address: tuple[str, int] = self._listener.address
        return address

    def lead(self) -> None:
        """Become rank 0; returns when the engine runs or failed."""
        assert self._plan is not None
        assert self._listener is not None
        announce(self._plan)
        connection = Client(self._plan.parent, authkey=self._plan.key)
        self._start(run_leader, self._plan, self._listener, connection, self._engine_runs)
        self._started.wait()
        if self._loop is None:
            raise self._failed[0]

    def join(self, plan: RankPlan) -> None:
        """Become another rank."""
        line.choose(plan.spec.line)
        announce(plan)
        self._start(follow, connect(plan.collective, plan.key))

    def abort_request(self, request_id: int) -> None:
        """Pass a cancel message on to the engine of this rank."""
        self._loop.post("cancel", request_id)

    def shutdown(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _start(self, function: Any, *args: Any) -> None:
        def run() -> None:
            try:
                function(*args)
            except Exception as error:
                self._failed.append(error)
            self._started.set()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def _engine_runs(self, loop: Any) -> None:
        self._loop = loop
        self._started.set()


RayWorkerWrapper.__module__ = WORKER_MODULE
