"""From a launch to its worker group: every launcher is made here."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import ray

from serve.engines.factory import make_engine
from serve.engines.trtllm.settings import TrtllmSettings
from serve.errors import ConfigError
from serve.workers.engine_env import EngineEnv
from serve.workers.group import WorkerGroup
from serve.workers.launch import EngineLaunch
from serve.workers.launchers.engine_host import EngineHostLauncher
from serve.workers.launchers.in_process import InProcessLauncher
from serve.workers.launchers.mpi import MpiLauncher
from serve.workers.launchers.port import Launcher
from serve.workers.launchers.ray_orchestrator import RayOrchestratorLauncher
from serve.workers.launchers.torch_distributed import TorchDistributedLauncher
from serve.workers.nodes import RayNodes
from serve.workers.rank_program import make_program


def make_group(launch: EngineLaunch) -> WorkerGroup:
    """Make the group of an engine, in the replica that has reserved what the launch says. Nothing is started yet."""
    nodes = RayNodes()
    return WorkerGroup(_make_launcher(launch, nodes), launch.watch, nodes=nodes, gpus=_own_gpus())


def _make_launcher(launch: EngineLaunch, nodes: RayNodes) -> Launcher:
    plan, engine, model_dir = launch.plan, launch.engine, Path(launch.model_dir)
    if plan.launcher == "torch_distributed":
        if isinstance(engine, TrtllmSettings):
            raise ConfigError("engine: trtllm starts its ranks itself; use orchestrator mpi or ray")
        return TorchDistributedLauncher(
            plan, make_program(engine, model_dir), launch.watch, env=launch.env, nodes=nodes
        )
    if plan.host_bundle is not None or launch.env is not None:
        env = launch.env or EngineEnv(py_executable=sys.executable)
        return EngineHostLauncher(plan, env, engine, model_dir, launch.watch, nodes=nodes)
    make = partial(make_engine, engine, model_dir, plan.layout)
    if plan.launcher == "mpi":
        return MpiLauncher(make, plan.layout, nodes.here)
    if plan.launcher == "ray":
        assert isinstance(engine, TrtllmSettings), "planned for TensorRT-LLM only"
        return RayOrchestratorLauncher(make, plan, [launch.model_dir, *engine.further_checkpoints])
    return InProcessLauncher(make, plan.layout)


def _own_gpus() -> list[str]:
    ids: dict[str, list[Any]] = ray.get_runtime_context().get_accelerator_ids()
    return [str(gpu) for gpu in ids.get("GPU", [])]
