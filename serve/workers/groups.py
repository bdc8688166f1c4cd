"""From a launch to its worker group: every launcher is made here."""

import sys
from pathlib import Path
from typing import Any

import ray

from serve.engines.trtllm.settings import TrtllmSettings
from serve.errors import ConfigError
from serve.workers.engine_env import EngineEnv
from serve.workers.group import WorkerGroup
from serve.workers.group_settings import DEFAULT_START_LIMIT_S
from serve.workers.launch import EngineLaunch
from serve.workers.launchers.engine_host import EngineHostLauncher
from serve.workers.launchers.hosting import make_hosting_launcher
from serve.workers.launchers.port import Launcher
from serve.workers.launchers.torch_distributed import TorchDistributedLauncher
from serve.workers.nodes import RayNodes
from serve.workers.rank_program import make_program

_ENGINE_FIRST_S = 60.0  # its limit begins later: after the environment was checked, and hosts and ranks have started


def make_group(launch: EngineLaunch) -> WorkerGroup:
    """Make the group of an engine, in the replica that has reserved what the launch says. Nothing is started yet."""
    nodes = RayNodes()
    watch = launch.watch.model_copy(update={"start_limit_s": start_limit_s(launch)})
    return WorkerGroup(_make_launcher(launch, nodes), watch, nodes=nodes, gpus=_own_gpus())


def start_limit_s(launch: EngineLaunch) -> float:
    """Return how long the group waits for its engine: by default longer than the engine itself, which says more."""
    if launch.watch.start_limit_s is not None:
        return launch.watch.start_limit_s
    if isinstance(launch.engine, TrtllmSettings):
        return launch.engine.start_timeout_s + _ENGINE_FIRST_S
    return DEFAULT_START_LIMIT_S


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
    return make_hosting_launcher(engine, model_dir, plan, nodes.here)


def _own_gpus() -> list[str]:
    ids: dict[str, list[Any]] = ray.get_runtime_context().get_accelerator_ids()
    return [str(gpu) for gpu in ids.get("GPU", [])]
