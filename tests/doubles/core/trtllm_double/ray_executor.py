"""RayExecutor: one Ray actor a rank (reference 4.2, 4.3)."""

import asyncio
import importlib
import os
from typing import Any

import ray

from trtllm_double import line, switches
from trtllm_double.async_queue import running_loop
from trtllm_double.engine_spec import EngineSpec
from trtllm_double.proxy import ChannelExecutor
from trtllm_double.ray_worker import NODE_VARIABLE, WORKER_MODULE

if line.current().is_newest:
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
else:  # 1.2.x imports it from where Ray had it until 2.54 (reference 4.3)
    from ray.util.placement_group import PlacementGroupSchedulingStrategy

_STRIPPED = ("RAY_RAYLET_PID", "RAY_NODE_IP_ADDRESS") if line.current().is_newest else ()
_SHUTDOWN_S = 30.0
_DEFAULT_NOSET = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"


def start_now(args: Any, spec: EngineSpec) -> "RayExecutor":
    """Start the ranks in this thread, which must not run an event loop."""
    executor = RayExecutor(args, spec)
    if running_loop() is None:
        executor.create_workers()
    executor.set_up_engine()
    return executor


async def start_deferred(args: Any, spec: EngineSpec) -> "RayExecutor":
    """AsyncLLM.setup_async: start the ranks on an event loop."""
    executor = RayExecutor(args, spec)
    await asyncio.to_thread(executor.create_workers)
    await asyncio.to_thread(executor.set_up_engine)
    return executor


class RayExecutor(ChannelExecutor):
    """Ranks that are actors; rank 0 is on the node of this process, and talks over a unix socket."""

    def __init__(self, args: Any, spec: EngineSpec) -> None:
        assert not args.num_postprocess_workers, "Postprocess parallel is not supported in RayExecutor"
        os.environ[_DEFAULT_NOSET] = "1"
        os.environ["RAY_DEDUP_LOGS"] = "0"
        self._owns_cluster = False
        if not ray.is_initialized():
            self._start_cluster()
        super().__init__()
        self._spec, self._config = spec, args.ray_placement_config
        self._tensor = args.tensor_parallel_size
        self._owned_group: Any = None
        self.workers: list[Any] = []

    def _start_cluster(self) -> None:
        options: dict[str, Any] = {
            "include_dashboard": False,
            "namespace": "trtllm",
            "ignore_reinit_error": True,
            "runtime_env": {"env_vars": {_DEFAULT_NOSET: "1"}},
        }
        if os.environ.get("TLLM_RAY_FORCE_LOCAL_CLUSTER") != "1":
            try:
                ray.init(address="auto", **options)
            except ConnectionError:
                pass
            else:
                return
        ray.init(**options)
        self._owns_cluster = True

    def create_workers(self) -> None:
        """Create one actor a rank, in the bundles of the placement (reference 4.2, a to c)."""
        world = self._spec.world_size
        assert world % self._tensor == 0, "world_size must be a multiple of tp_size"
        share = self._config.per_worker_gpu_share if self._config else None
        share = float(os.environ.get("TRTLLM_RAY_PER_WORKER_GPUS", "1.0")) if share is None else share
        environ = {name: value for name, value in os.environ.items() if name not in _STRIPPED}
        environ |= {"TLLM_DISABLE_MPI": "1", "MASTER_ADDR": ray.util.get_node_ip_address()}
        environ[NODE_VARIABLE] = ray.get_runtime_context().get_node_id()
        worker_class = importlib.import_module(WORKER_MODULE).RayWorkerWrapper
        for rank, (group, bundle) in enumerate(self._placement(world)):
            # No num_cpus, as upstream: Ray then takes one CPU for the worker's whole life.
            actor = ray.remote(worker_class).options(
                num_gpus=share,
                runtime_env={"env_vars": environ},
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=group, placement_group_bundle_index=bundle
                ),
            )
            self.workers.append(actor.remote(rank, world))
        try:
            ray.get([worker.ready.remote() for worker in self.workers])
        except ray.exceptions.RayError as error:
            raise RuntimeError("RayGPUWorker died during initialization") from error

    def set_up_engine(self) -> None:
        """Build the engine on all workers; rank 0 first, which opens the store for the others."""
        if not self.workers:
            raise IndexError("list index out of range")  # constructed with a running event loop: there is no rank 0
        leader, others = self.workers[0], self.workers[1:]
        try:
            address = ray.get(leader.open_store.remote(self.plan(self._spec, 0, None)))
            joining = [
                worker.join.remote(self.plan(self._spec, rank, address)) for rank, worker in enumerate(others, 1)
            ]
            leading = leader.lead.remote()
            self.accept(lambda: _failure([leading, *joining]))
        except ray.exceptions.RayError as error:
            raise RuntimeError("RayGPUWorker died during initialization") from error
        except BaseException:
            self._kill()
            raise

    def abort_request(self, request_id: int) -> None:
        """A blocking call of the rank-0 actor (reference 2.4)."""
        if running_loop() is not None:
            switches.misuse("abort() was called on an event loop's thread: with the Ray orchestrator it blocks")
        ray.get(self.workers[0].abort_request.remote(request_id))

    def lost(self) -> str | None:
        return None  # no monitor was found in upstream's Ray executor (reference 2.5)

    def stop(self) -> None:
        self.send("stop")
        pending = [worker.shutdown.remote() for worker in self.workers]
        ray.wait(pending, num_returns=len(pending), timeout=_SHUTDOWN_S)
        if line.current().is_newest:
            self._kill()
        self.workers = []  # 1.2.x: the workers go with their handles
        if self._owned_group is not None:
            ray.util.remove_placement_group(self._owned_group)
        self.clean_up()
        if self._owns_cluster:
            ray.shutdown()

    def _kill(self) -> None:
        for worker in self.workers:
            ray.kill(worker)

    def _placement(self, world: int) -> list[tuple[Any, int]]:
        if self._config is not None and self._config.placement_groups is not None:
            groups, indices = self._config.placement_groups, self._config.placement_bundle_indices
            pairs = [(group, index) for group, of in zip(groups, indices, strict=True) for index in of]
            if len(pairs) != world:
                raise ValueError(f"Total bundle indices ({len(pairs)}) must equal world_size ({world})")
            return pairs
        if named := os.environ.get("TRTLLM_RAY_BUNDLE_INDICES"):
            group = ray.util.get_current_placement_group()
            chosen = [int(index) for index in named.split(",")]
            assert len(set(chosen)) == len(chosen) == world, "one distinct bundle a rank"
            self._owned_group = group  # upstream takes the group for its own, and removes it at shutdown
            return [(group, index) for index in chosen]
        group = ray.util.placement_group([{"GPU": 1, "CPU": 1} for _ in range(world)], strategy="PACK")
        ray.get(group.ready())
        self._owned_group = group
        return [(group, index) for index in range(world)]


def _failure(calls: list[Any]) -> BaseException | None:
    """Return what a rank raised while it was built."""
    done, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
    for call in done:
        try:
            ray.get(call)
        except ray.exceptions.RayError as error:
            return error
    return None
