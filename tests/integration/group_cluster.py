"""GroupCluster: several Ray nodes on one machine with GPUs that are none, and a Serve deployment of a WorkerGroup."""

import contextlib
import gc
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve as ray_serve
from ray.cluster_utils import Cluster
from ray.exceptions import RayActorError

from serve.core.group_state import to_line
from serve.core.parallel import ParallelLayout
from serve.core.placement import NodeResources, PlacementPlan, plan_placement
from serve.core.request import GenerateRequest, SamplingParams, pack_tokens
from serve.engines.simulated.settings import SimulatedSettings
from serve.errors import EngineDead
from serve.logs import configure_logging
from serve.workers.group import WorkerGroup
from serve.workers.group_settings import GroupSettings
from serve.workers.launchers.torch_distributed import TorchDistributedLauncher
from serve.workers.nodes import RayNodes, living_nodes
from serve.workers.processes import kill_group, marked_processes
from serve.workers.rank_program import RankPlace, RankProgram, SimulatedProgram, make_program

ENGINE = SimulatedSettings.model_validate({"latency": {"kind": "fixed", "decode_step_s": 0.01}})
QUICKSTART = Path(__file__).parents[2] / "serve/models/quickstart"
SMALL_RANK = {"GPU": 1.0, "CPU": 0.1}
SMALL_REPLICA = {"CPU": 0.1}
WAIT_S = 90.0


class GroupReplica:
    """A Serve deployment that does with a group what a replica has to.

    Args:
        plan: What was reserved.
        program: What the ranks run.
        settings: How they are watched.
        log_dir: Where a group that failed leaves its log.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, plan: PlacementPlan, program: RankProgram, settings: GroupSettings, log_dir: str
    ) -> None:
        configure_logging()
        nodes = RayNodes()
        self._log_dir = Path(log_dir)
        self._launcher = TorchDistributedLauncher(plan, program, settings)
        self._group = WorkerGroup(self._launcher, settings, nodes=nodes)
        await self._group.start()

    async def describe(self) -> dict[str, Any]:
        """Return the group's id, its process, and those of its ranks."""
        return {
            "id": self._group.id,
            "pid": os.getpid(),
            "node": ray.get_runtime_context().get_node_id(),
            "state": self._group.state.value,
            "ranks": [asdict(process) for process in self._launcher.ranks()],
        }

    async def run(self, name: str, tokens: int) -> list[float]:
        """Generate so many tokens; returns when each came, or when the stream broke with -1 before it."""
        times = []
        request = GenerateRequest(name, "m", pack_tokens(range(40)), SamplingParams(max_tokens=tokens))
        try:
            async for delta in self._group.generate(request):
                times += [time.monotonic()] * len(delta.token_ids)  # deltas may arrive merged
        except EngineDead:
            return [*times, -1.0, time.monotonic()]
        return times

    async def check_health(self) -> None:
        """Called by Serve."""
        try:
            self._group.check_health()
        except EngineDead as exc:
            await self._group.wait_until_stopped()
            lines = [to_line(entry) for entry in self._group.log]
            written = self._log_dir / f"{self._group.id}.part"
            written.write_text("\n".join(lines))
            written.rename(self._log_dir / f"{self._group.id}.jsonl")
            raise RayActorError(error_msg=str(exc)) from None

    async def __del__(self) -> None:
        if hasattr(self, "_group"):
            await self._group.stop()


class GroupCluster:
    """A head without GPUs, and nodes that pretend to have some.

    Args:
        log_dir: Where failed groups leave their logs.
    """

    def __init__(self, log_dir: Path) -> None:
        self.log_dir = log_dir
        self._cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False, "num_gpus": 0}
        )
        self._known: set[str] = set()
        ray.init(address=self._cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        ray_serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})

    def add_node(self, gpus: int, cpus: float = 4) -> Any:
        """Add a node."""
        return self._cluster.add_node(num_gpus=gpus, num_cpus=cpus)

    def gpu_nodes(self) -> list[Any]:
        """Return the nodes that were added and are there."""
        return list(self._cluster.worker_nodes)

    def kill_node(self, node: Any) -> None:
        """Kill a node's raylet, as the loss of the machine would."""
        self._cluster.remove_node(node, allow_graceful=False)

    def nodes(self) -> list[NodeResources]:
        """Return the living nodes."""
        return list(living_nodes().values())

    def deploy(
        self,
        plan: PlacementPlan,
        program: RankProgram | None = None,
        settings: GroupSettings | None = None,
    ) -> Any:
        """Deploy one replica; returns its handle. Ranks run the simulated engine, unless there is another program."""
        deployment = ray_serve.deployment(
            GroupReplica,
            name="group",
            num_replicas=1,
            max_ongoing_requests=512,
            health_check_period_s=0.5,
            health_check_timeout_s=30,
            graceful_shutdown_wait_loop_s=0.1,
            **plan.serve_options(),
        )
        program = program or make_program(ENGINE, QUICKSTART)
        bound = deployment.bind(plan, program, settings or GroupSettings(), str(self.log_dir))
        handle = ray_serve.run(bound, name="app", route_prefix=None)
        self.describe(handle)
        return handle

    def describe(self, handle: Any) -> dict[str, Any]:
        """Return what the replica says of its group, once there is one."""
        answer: dict[str, Any] = handle.describe.remote().result(timeout_s=WAIT_S)
        self._known.add(answer["id"])
        return answer

    def until_replaced(self, handle: Any, old: str) -> dict[str, Any]:
        """Wait for another group than `old`."""
        deadline_s = time.monotonic() + WAIT_S
        while True:
            with contextlib.suppress(Exception):  # the old replica dies while it is asked
                answer = handle.describe.remote().result(timeout_s=5)
                if answer["id"] != old and answer["state"] == "ready":
                    self._known.add(answer["id"])
                    return answer  # type: ignore[no-any-return]
            assert time.monotonic() < deadline_s, "the group was not replaced"
            time.sleep(0.05)

    def delete(self) -> None:
        """Delete the deployment."""
        ray_serve.delete("app")

    def log_lines(self, group: str) -> list[str]:
        """Return the log of a group that failed, when it is there."""
        path = self.log_dir / f"{group}.jsonl"
        until(lambda: path.exists(), f"no log of group {group}")
        return path.read_text().splitlines()

    def end(self) -> None:
        """End everything."""
        ray_serve.shutdown()
        ray.shutdown()
        self._cluster.shutdown()
        gc.collect()  # sockets that Ray's utilities forgot: here, where their warnings are expected
        for group in self._known:
            kill_group(group, 5.0)


@dataclass(frozen=True)
class ProgramWithChildren(SimulatedProgram):
    """Ranks that start processes of their own, one of them in another session, as MPI and compilers do."""

    def follow(self, place: RankPlace, on_beat: Callable[[], None]) -> None:
        """Start two children, then be a rank."""
        for new_session in (True, False):
            subprocess.Popen(
                [sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=new_session
            )
        super().follow(place, on_beat)


@dataclass(frozen=True)
class WedgingProgram(SimulatedProgram):
    """A rank that hangs after a while, as one whose GPU does not answer: its process goes on all the same."""

    def follow(self, place: RankPlace, on_beat: Callable[[], None]) -> None:
        """Be a rank for a second."""
        for _ in range(10):
            on_beat()
            time.sleep(0.1)
        place.leave.wait()


def processes_of(group: str) -> dict[int, Any]:
    """Return the living processes of a group."""
    return dict(marked_processes(lambda mark: mark.group == group))


def until(condition: Callable[[], bool], what: str, limit_s: float = WAIT_S) -> None:
    """Wait until something holds."""
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.02)


def small_plan(layout: ParallelLayout) -> PlacementPlan:
    """Plan ranks that take little of a small machine."""
    return plan_placement(layout, "torch_distributed", replica=SMALL_REPLICA, rank=SMALL_RANK)
