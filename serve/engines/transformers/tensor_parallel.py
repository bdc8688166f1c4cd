"""Tensor parallelism of the transformers engine: one model over several processes, each with a device of its own.

    rank 0    TransformersEngine(model_dir, settings, tensor_rank): the engine; has the requests, decides, samples
    others    run_follower(model_dir, settings, tensor_rank, on_beat): make the same calls of the library as rank 0

Rank 0's process opens a store (`open_store`), whose address every rank is given. They meet there, and from then on
have a control connection each to rank 0 (`followers.py`, `leader_link.py`, `messages.py`), and a process group for what
the layers exchange (`collectives.py`). Which part of the weights a rank has is in `sharding.py`; how the ranks stay in
the same state, in `replication.py`. If one rank ends, all do.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch

from serve.engines.transformers import messages
from serve.engines.transformers.collectives import TensorGroup
from serve.engines.transformers.leader_link import LeaderLink, follow
from serve.engines.transformers.loading import LoadedModel, checkpoint_fingerprint, choose_device, load_model
from serve.engines.transformers.rendezvous import TensorRank, open_store, visit_store
from serve.engines.transformers.replication import FollowingBatcher
from serve.engines.transformers.settings import TransformersSettings
from serve.engines.transformers.team import software
from serve.errors import ConfigError, EngineDead

__all__ = ["TensorRank", "open_store", "run_follower"]

_log = logging.getLogger(__name__)

_BEAT_S = 0.25  # between two beats, at least


def run_follower(
    model_dir: Path, settings: TransformersSettings, tensor_rank: TensorRank, on_beat: Callable[[], None]
) -> None:
    """Be a rank other than 0, on this thread, until the leader stops.

    Args:
        model_dir: A Hugging Face checkpoint, the same as rank 0's.
        settings: The same as rank 0's.
        tensor_rank: Who this is.
        on_beat: Called about four times a second while this rank advances or waits for work; not while it loads.

    Raises:
        ConfigError: The model cannot be loaded here; rank 0 says so, too.
        EngineDead: The leader or another rank is gone, or this rank lost a step.
    """
    beat = _Beat(on_beat)
    with torch.inference_mode():
        leader = follow(tensor_rank, visit_store(tensor_rank), software(), beat)
        try:
            _serve(model_dir, settings, tensor_rank, leader, beat)
        except Exception as exc:
            error = exc if isinstance(exc, ConfigError | EngineDead) else EngineDead(f"{type(exc).__name__}: {exc}")
            _tell(leader, messages.Failed("operator" if isinstance(exc, ConfigError) else "engine", str(error)))
            if error is exc:
                raise
            raise error from exc
        finally:
            leader.close()


class _Beat:
    """Passes beats on, but not each of the many in a step."""

    def __init__(self, on_beat: Callable[[], None]) -> None:
        self._on_beat = on_beat
        self._last_s = 0.0

    def __call__(self) -> None:
        now_s = time.monotonic()
        if now_s - self._last_s >= _BEAT_S:
            self._last_s = now_s
            self._on_beat()


def _serve(
    model_dir: Path, settings: TransformersSettings, rank: TensorRank, leader: LeaderLink, beat: Callable[[], None]
) -> None:
    device = choose_device(settings, rank.device_index)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    group = TensorGroup(rank, visit_store(rank), device, settings.max_step_s, beat)
    leader.watch(group.abort)
    try:
        loaded = load_model(model_dir, settings, group)
        leader.answer(messages.Loaded(checkpoint_fingerprint(model_dir), loaded.num_blocks))
        _follow_orders(loaded, leader)
    finally:
        group.abort()


def _follow_orders(loaded: LoadedModel, leader: LeaderLink) -> None:
    batcher: FollowingBatcher | None = None
    while True:
        order = leader.next_order()
        if isinstance(order, messages.Stop):
            if order.reason is not None:
                raise EngineDead(f"the leader ended: {order.reason}")
            return
        if isinstance(order, messages.MakeCache):
            batcher = None  # before the next one needs its memory
            batcher = _make_batcher(loaded, order, leader)
        elif batcher is not None:
            batcher.carry_out(order)


def _make_batcher(loaded: LoadedModel, order: messages.MakeCache, leader: LeaderLink) -> FollowingBatcher | None:
    try:
        batcher = FollowingBatcher(loaded.model, order.options, leader)
    except (MemoryError, torch.OutOfMemoryError) as exc:
        _log.info("a KV cache of %d blocks does not fit the memory: %s", order.options.num_blocks, exc)
        leader.answer(messages.CacheMade(None))
        return None
    leader.answer(messages.CacheMade(batcher.ledger.total_blocks))
    return batcher


def _tell(leader: LeaderLink, failed: messages.Failed) -> None:
    try:
        leader.answer(failed)
    except EngineDead as exc:
        _log.debug("nobody is left to be told: %s", exc)
