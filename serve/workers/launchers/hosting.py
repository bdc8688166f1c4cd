"""The launcher for the process that holds an engine, be it the replica or a host of its own."""

from functools import partial
from pathlib import Path

from serve.core.placement import PlacementPlan
from serve.engines.factory import AnyEngineSettings, make_engine
from serve.engines.trtllm.settings import TrtllmSettings
from serve.workers.launchers.in_process import InProcessLauncher
from serve.workers.launchers.mpi import MpiLauncher
from serve.workers.launchers.port import Launcher
from serve.workers.launchers.ray_orchestrator import RayOrchestratorLauncher


def make_hosting_launcher(engine: AnyEngineSettings, model_dir: Path, plan: PlacementPlan, node_id: str) -> Launcher:
    """Make the launcher of a plan whose engine lives in this process.

    Args:
        engine: Which engine, and its settings.
        model_dir: Its checkpoint on this node.
        plan: Who starts its ranks, and what was reserved for them.
        node_id: Of this machine, as the group knows it.
    """
    make = partial(make_engine, engine, model_dir, plan.layout)
    match plan.launcher:
        case "mpi":
            return MpiLauncher(make, plan.layout, node_id)
        case "ray":
            further = engine.further_checkpoints if isinstance(engine, TrtllmSettings) else ()
            return RayOrchestratorLauncher(make, plan, [str(model_dir), *further])
        case "in_process":
            return InProcessLauncher(make, plan.layout)
        case "torch_distributed":
            raise AssertionError("its ranks are actors, and the first of them holds the engine")
