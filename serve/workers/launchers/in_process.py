"""InProcessLauncher: an engine of one rank, which is this process."""

import os
from collections.abc import Callable, Sequence

from serve.core.parallel import ParallelLayout
from serve.engines.protocol import Engine
from serve.engines.trtllm.orchestration import Orchestration, engine_environ
from serve.errors import ConfigError
from serve.workers.launchers.port import RankObserver, RankProcess


class InProcessLauncher:
    """Launcher port: no other process is started, so that there is nothing to watch or to end.

    Args:
        make_engine: Makes the engine, which loads nothing yet; the orchestration matters to TensorRT-LLM only.
        layout: How it is cut: not at all.
    """

    def __init__(self, make_engine: Callable[[Orchestration], Engine], layout: ParallelLayout | None = None) -> None:
        self._make_engine = make_engine
        self._layout = layout or ParallelLayout()

    async def launch(self, observer: RankObserver) -> Engine:
        """Start the engine; see the port."""
        if self._layout.world_size > 1:
            raise ConfigError(f"orchestrator: in_process has one rank, not {self._layout.world_size}; use mpi or ray")
        environ = engine_environ("in_process", self._layout, os.environ)
        engine = self._make_engine(Orchestration("in_process", environ=environ))
        try:
            await engine.start()
        except BaseException:
            await engine.stop()
            raise
        return engine

    def ranks(self) -> Sequence[RankProcess]:
        """Return no process: the only rank is a part of this one."""
        return ()

    async def end(self, grace_s: float) -> None:
        """Do nothing: the group has stopped the engine."""
