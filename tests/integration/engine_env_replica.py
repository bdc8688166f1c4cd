"""EnvReplica: an actor in the gateway's environment that does what a replica does with an engine's own environment."""

import os
from contextlib import aclosing
from importlib.metadata import version
from pathlib import Path
from typing import Any

from serve.core.placement import PlacementPlan
from serve.core.request import GenerateRequest
from serve.engines.factory import AnyEngineSettings
from serve.engines.protocol import EngineStats
from serve.errors import EngineDead
from serve.logs import configure_logging
from serve.workers.engine_env import EngineEnv
from serve.workers.engine_host import HostReport
from serve.workers.group import WorkerGroup
from serve.workers.group_settings import GroupSettings
from serve.workers.launchers.engine_host import EngineHostLauncher
from serve.workers.launchers.port import RankProcess
from serve.workers.nodes import RayNodes

LIBRARIES = ("fastapi", "starlette", "numpy", "transformers", "torch", "ray", "raytrt")


class EnvReplica:
    """Owns one group, whose engine is in `env`."""

    def __init__(self, plan: PlacementPlan, env: EngineEnv, engine: AnyEngineSettings, model_dir: str) -> None:
        configure_logging()
        settings, nodes = GroupSettings(), RayNodes()
        self._launcher = EngineHostLauncher(plan, env, engine, Path(model_dir), settings, nodes=nodes)
        self._group = WorkerGroup(self._launcher, settings, nodes=nodes)

    async def start(self) -> HostReport:
        """Start the engine; returns what its host says of itself."""
        await self._group.start()
        return self._launcher.report

    async def describe(self) -> dict[str, Any]:
        """Return what this side is, and the engine."""
        return {
            "pid": os.getpid(),
            "group": self._group.id,
            "libraries": {name: version(name) for name in LIBRARIES},
            "engine": self._group.info.engine,
            "state": self._group.state.value,
        }

    async def ranks(self) -> list[RankProcess]:
        """Return the group's processes."""
        return list(self._launcher.ranks())

    async def host(self) -> Any:
        """Return the host's actor handle."""
        return self._launcher._actor

    async def generate(self, request: GenerateRequest) -> list[int]:
        """Run one sequence; returns its tokens."""
        async with aclosing(self._group.generate(request)) as deltas:
            return [token async for delta in deltas for token in delta.token_ids]

    async def generate_until_death(self, request: GenerateRequest) -> str:
        """Run one sequence that is not meant to end; returns why it did."""
        try:
            await self.generate(request)
        except EngineDead as exc:
            return str(exc)
        return "it ended by itself"

    async def cached_blocks(self) -> int:
        """Read the KV events until they are where the engine is; returns how many blocks are cached."""
        async with aclosing(self._group.kv_events()) as batches:
            snapshot = await anext(batches)
        event = snapshot.events[0]
        return len(event.block_hashes)

    async def stats(self) -> EngineStats:
        return self._group.stats()

    async def wait_until_stopped(self) -> str:
        """Wait until a group that failed is cleaned up; returns why it failed."""
        await self._group.wait_until_stopped()
        try:
            self._group.check_health()
        except EngineDead as exc:
            return str(exc)
        return "it is healthy"

    async def stop(self) -> None:
        await self._group.stop()
