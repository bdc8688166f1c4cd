"""RankProgram: what the ranks of an engine run whose processes are Ray actors. Pickled to each of them.

Of ours nothing is imported here but `serve.core` and `serve.engines`: ranks may live in a Python environment without
Ray Serve.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from serve.engines.factory import make_engine
from serve.engines.protocol import Engine
from serve.engines.simulated.settings import SimulatedSettings
from serve.engines.transformers.settings import TransformersSettings

_IDLE_BEAT_S = 0.25


@dataclass(frozen=True)
class RankPlace:
    """Where one rank stands.

    Attributes:
        rank: Below `world_size`.
        world_size: Ranks of the group.
        meeting: What rank 0's `open_meeting` returned.
        device_index: CUDA device of this process, as PyTorch counts; None on a CPU.
        leave: Set when the rank has to end.
    """

    rank: int
    world_size: int
    meeting: tuple[str, int] | None = None
    device_index: int | None = None
    leave: threading.Event = field(default_factory=threading.Event)


class RankProgram(Protocol):
    """What the ranks of one engine do."""

    def open_meeting(self, host: str) -> tuple[tuple[str, int] | None, Any]:
        """Open the place where ranks find each other, in rank 0's process.

        Args:
            host: This machine's address, as the other nodes know it.

        Returns:
            Its address, if there is such a place; and what has to be kept as long as the group lives.
        """

    def make_engine(self, place: RankPlace) -> Engine:
        """Make rank 0's engine; its `start` is called once every other rank follows."""

    def follow(self, place: RankPlace, on_beat: Callable[[], None]) -> None:
        """Be another rank, on a thread of its own, until the engine stops or `place.leave` is set.

        Args:
            place: Which rank.
            on_beat: To be called a few times a second while it advances or waits for work, from when it has loaded.

        Raises:
            ConfigError, EngineDead: It cannot go on.
        """


@dataclass(frozen=True)
class TransformersProgram:
    """Tensor parallelism of the transformers engine: rank 0 leads, the others follow.

    Attributes:
        settings: Of the engine.
        model_dir: Its checkpoint, at the same path on every node.
    """

    settings: TransformersSettings
    model_dir: Path

    # PyTorch is imported late: where a rank is described it need not be installed.

    def open_meeting(self, host: str) -> tuple[tuple[str, int] | None, Any]:
        """Open a TCP store on a free port."""
        from serve.engines.transformers.tensor_parallel import open_store

        store, port = open_store(host)
        return (host, port), store

    def make_engine(self, place: RankPlace) -> Engine:
        """Make the leading engine."""
        from serve.engines.transformers.engine import TransformersEngine

        return TransformersEngine(self.model_dir, self.settings, tensor_rank=self._tensor_rank(place))

    def follow(self, place: RankPlace, on_beat: Callable[[], None]) -> None:
        """Follow the leader; it says when to end."""
        from serve.engines.transformers.tensor_parallel import run_follower

        run_follower(self.model_dir, self.settings, self._tensor_rank(place), on_beat)

    def _tensor_rank(self, place: RankPlace) -> Any:
        if place.world_size == 1:
            return None  # there is nobody to talk to
        from serve.engines.transformers.tensor_parallel import TensorRank

        assert place.meeting is not None
        return TensorRank(place.rank, place.world_size, *place.meeting, device_index=place.device_index)


@dataclass(frozen=True)
class SimulatedProgram:
    """The simulated engine on several ranks: rank 0 does everything, the others can be killed.

    Attributes:
        settings: Of the engine.
        model_dir: The checkpoint whose tokens it generates.
    """

    settings: SimulatedSettings
    model_dir: Path

    def open_meeting(self, host: str) -> tuple[tuple[str, int] | None, Any]:
        """Open nothing."""
        return None, None

    def make_engine(self, place: RankPlace) -> Engine:
        """Make the engine."""
        return make_engine(self.settings, self.model_dir)

    def follow(self, place: RankPlace, on_beat: Callable[[], None]) -> None:
        """Wait for the end."""
        while not place.leave.wait(_IDLE_BEAT_S):
            on_beat()


def make_program(
    settings: TransformersSettings | SimulatedSettings, model_dir: Path
) -> TransformersProgram | SimulatedProgram:
    """Return what the ranks of such an engine run."""
    if isinstance(settings, TransformersSettings):
        return TransformersProgram(settings, model_dir)
    return SimulatedProgram(settings, model_dir)


def device_index(gpu_ids: list[str], visible: str | None) -> int | None:
    """Return which CUDA device a rank has got, as PyTorch counts them.

    Every GPU of the node stays visible: NCCL with a single visible device a process hangs on NVLink switches
    (NVIDIA/nccl#1906) and cannot map its peers' memory.

    Args:
        gpu_ids: The GPU that Ray gave, as the driver names it; none on a CPU.
        visible: CUDA_VISIBLE_DEVICES; None if it is not set.

    Raises:
        ValueError: Ray gave a GPU that is hidden here.
    """
    if not gpu_ids:
        return None
    if not visible:
        return int(gpu_ids[0])
    names = [name.strip() for name in visible.split(",")]
    if gpu_ids[0] not in names:
        raise ValueError(f"Ray gave GPU {gpu_ids[0]}, but CUDA_VISIBLE_DEVICES={visible} hides it: start Ray without")
    return names.index(gpu_ids[0])
