"""Follower ranks for tests: real processes, forked from one that has imported PyTorch already."""

import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from serve.engines.transformers.engine import TransformersEngine
from serve.engines.transformers.settings import TransformersSettings
from serve.engines.transformers.tensor_parallel import TensorRank, open_store, run_follower
from tests.forks import fork_server

HOST = "127.0.0.1"
MEETING_S = 60.0


def follow(model_dir: Path, settings: TransformersSettings, rank: TensorRank) -> None:
    """Be a follower; what a process of its own runs. Its exit status is 1 if it did not end as it should."""
    torch.set_num_threads(1)
    run_follower(model_dir, settings, rank, lambda: None)


class TensorEngine(TransformersEngine):
    """Rank 0 in this process, and a process for each other rank, which `start` starts.

    Args:
        model_dir: For all ranks.
        settings: For all ranks.
        world_size: Ranks.
        follower_settings: Of the others, if they differ.
        run: What the others' processes run.
    """

    def __init__(
        self,
        model_dir: Path,
        settings: TransformersSettings,
        world_size: int = 2,
        follower_settings: TransformersSettings | None = None,
        run: Callable[[Path, TransformersSettings, TensorRank], None] = follow,
    ) -> None:
        self._store, port = open_store(HOST)
        ranks = [TensorRank(rank, world_size, HOST, port, None, MEETING_S) for rank in range(world_size)]
        super().__init__(model_dir, settings, ranks[0])
        context = fork_server()
        self.followers: list[BaseProcess] = [
            context.Process(target=run, args=(model_dir, follower_settings or settings, rank), daemon=True)
            for rank in ranks[1:]
        ]

    async def start(self) -> None:
        for follower in self.followers:
            follower.start()
        await super().start()

    def kill_followers(self, number: signal.Signals = signal.SIGKILL) -> None:
        for follower in self.followers:
            assert follower.pid is not None
            os.kill(follower.pid, number)

    def exit_codes(self) -> list[int | None]:
        """Wait for the followers to end; how they did."""
        for follower in self.followers:
            follower.join(30)
        return [follower.exitcode for follower in self.followers]
