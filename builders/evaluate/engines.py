"""running: the engine of a step, started as a replica would start it, and stopped whatever happens."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from serve.core.placement import PlacementPlan
from serve.engines.factory import AnyEngineSettings, make_engine
from serve.engines.protocol import Engine
from serve.workers.launchers.in_process import InProcessLauncher
from serve.workers.launchers.port import RankProcess


@dataclass(frozen=True)
class EnginePlace:
    """Which engine, of which model, and where its ranks are.

    Attributes:
        settings: Of the engine.
        model_dir: Its checkpoint or engine files, at the same path on every node.
        plan: How its ranks are started; the step's process is in bundle 0 of it.
    """

    settings: AnyEngineSettings
    model_dir: Path
    plan: PlacementPlan

    @property
    def ranks_are_actors(self) -> bool:
        """Whether Ray has started the ranks, in processes of their own; else they are, or are below, this process."""
        return self.plan.launcher in ("ray", "torch_distributed") or self.plan.host_bundle is not None


@asynccontextmanager
async def running(place: EnginePlace) -> AsyncIterator[Engine]:
    """Start an engine, and stop it.

    Raises:
        ConfigError, BundleMismatch, EngineDead: As the engine.
    """
    engine = await _start(place)
    try:
        yield engine
    finally:
        await engine.stop()


async def _start(place: EnginePlace) -> Engine:
    settings, model_dir, plan = place.settings, place.model_dir, place.plan
    if plan.launcher == "in_process" and not place.ranks_are_actors:
        make = partial(make_engine, settings, model_dir, plan.layout)
        return await InProcessLauncher(make, plan.layout).launch(_Nobody())
    # Late: it imports Ray, which the process of a trial on one GPU need not wait for.
    from builders.evaluate.engine_groups import start_group

    return await start_group(settings, model_dir, plan, ranks_are_actors=place.ranks_are_actors)


class _Nobody:
    """RankObserver of an engine that is this process."""

    def rank_started(self, process: RankProcess) -> None:
        """There is none."""

    def rank_beat(self, rank: int) -> None:
        """There is none."""

    def rank_died(self, rank: int, reason: str) -> None:
        """There is none."""
