"""A stand-in for a Serve replica: an actor that owns a placement group and launches an engine host in it."""

import asyncio
import os
from contextlib import aclosing
from importlib.metadata import version
from pathlib import Path
from typing import Any

from serve.core.parallel import ParallelLayout
from serve.core.request import GenerateRequest
from serve.engines.factory import AnyEngineSettings
from serve.engines.protocol import Engine, EngineStats
from serve.errors import EngineDead
from serve.workers.engine_env import EngineEnv
from serve.workers.launchers.engine_host import EngineHostLauncher
from serve.workers.launchers.port import RankProcess


class Observer:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.started: list[RankProcess] = []
        self.beats = 0
        self.died: list[str] = []

    def rank_started(self, process: RankProcess) -> None:
        self.started.append(process)

    def rank_beat(self, rank: int) -> None:
        self.beats += 1

    def rank_died(self, rank: int, reason: str) -> None:
        self.died.append(reason)


class Replica:
    """Launches once. Everything in its environment is that of the gateway."""

    def __init__(self, env: EngineEnv, engine: AnyEngineSettings, model_dir: str, resources: dict[str, float]) -> None:
        self._observer = Observer()
        self._launcher = EngineHostLauncher(
            env,
            engine,
            Path(model_dir),
            ParallelLayout(),
            resources,
            bundle_index=1,
            environ={"RAYTRT_TEST_MARK": str(os.getpid())},
        )
        self._engine: Engine | None = None

    async def launch(self) -> str:
        """Start the engine; returns what it says of itself."""
        self._engine = await self._launcher.launch(self._observer)
        return self._engine.info.engine

    def libraries(self) -> dict[str, str]:
        """Return the versions on this side."""
        return {name: version(name) for name in ("fastapi", "starlette", "numpy", "transformers", "ray", "raytrt")}

    def report(self) -> Any:
        """Return what the host said of itself."""
        return self._launcher.report

    def host(self) -> Any:
        """Return the host's actor handle."""
        return self._launcher._actor

    async def generate(self, request: GenerateRequest) -> list[int]:
        """Run one sequence; returns its tokens."""
        assert self._engine is not None
        async with aclosing(self._engine.generate(request)) as deltas:
            return [token async for delta in deltas for token in delta.token_ids]

    async def generate_until_death(self, request: GenerateRequest) -> str:
        """Run one sequence that is not meant to end; returns why it did."""
        try:
            await self.generate(request)
        except EngineDead as exc:
            return str(exc)
        return "it ended by itself"

    async def beats(self, count: int) -> None:
        """Wait for so many more beats of the host."""
        wanted = self._observer.beats + count
        while self._observer.beats < wanted:  # noqa: ASYNC110  # the observer signals nothing
            await asyncio.sleep(0.05)

    def stats(self) -> EngineStats:
        assert self._engine is not None
        return self._engine.stats()

    def deaths(self) -> list[str]:
        """Return what the observer was told of lost ranks."""
        return self._observer.died

    async def end(self, grace_s: float) -> None:
        await self._launcher.end(grace_s)
