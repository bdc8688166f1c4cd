"""Collectives of one tensor-parallel group, over NCCL on GPUs and over gloo on CPUs.

The process group is made without registering it as the process's default group: a process may have several engines,
one after the other or at once, and what else in it uses `torch.distributed` is left alone.
"""

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]  # exported from C
from torch.distributed.distributed_c10d import (  # type: ignore[attr-defined]  # likewise
    AllgatherOptions,
    AllreduceOptions,
    GatherOptions,
)

from serve.engines.transformers.rendezvous import TensorRank, own_address

_log = logging.getLogger(__name__)


class TensorGroup:
    """What the layers of one model exchange between its ranks.

    Args:
        rank: This one.
        store: Of the group; all ranks make theirs at the same time.
        device: Where the tensors are.
        timeout_s: How long one collective may take.
        on_progress: Called before each collective.
    """

    def __init__(
        self,
        rank: TensorRank,
        store: TCPStore,
        device: torch.device,
        timeout_s: float,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.rank = rank.rank
        self.world_size = rank.world_size
        self.device = device
        self._on_progress = on_progress
        self._group = _make_group(rank, PrefixStore("raytrt/collectives", store), device, timedelta(seconds=timeout_s))
        self._all_reduce = AllreduceOptions()
        self._all_gather = AllgatherOptions()
        self._gather = GatherOptions()
        self._gather.rootRank = 0
        # On the stream that computes, instead of on one of its own that has to wait for it and be waited for.
        self._all_reduce.asyncOp = self._all_gather.asyncOp = self._gather.asyncOp = False

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up over all ranks, in place."""
        self._on_progress()
        tensor = tensor.contiguous()
        _finish(self._group.allreduce([tensor], self._all_reduce))
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the ranks' parts, of equal shapes, joined along the last dimension."""
        self._on_progress()
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        _finish(self._group.allgather([parts], [tensor], self._all_gather))
        return torch.cat(parts, dim=-1)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the ranks' parts, of equal shapes, joined along the last dimension; None but on rank 0."""
        self._on_progress()
        tensor = tensor.contiguous()
        if self.rank:
            _finish(self._group.gather([], [tensor], self._gather))
            return None
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        _finish(self._group.gather([parts], [tensor], self._gather))
        return torch.cat(parts, dim=-1)

    def abort(self) -> None:
        """End, at once: collectives in progress fail, and there may be no more. From any thread; waits for no rank."""
        try:
            self._group.abort()
        except RuntimeError as exc:
            _log.debug("collectives could not be aborted: %s", exc)


def _finish(work: Any) -> None:
    if work is not None:
        work.wait()


def _make_group(rank: TensorRank, store: PrefixStore, device: torch.device, timeout: timedelta) -> Any:
    options: Any
    if device.type == "cuda":
        # Only CUDA builds of PyTorch have it.
        from torch.distributed import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = timeout
        return ProcessGroupNCCL(store, rank.rank, rank.world_size, options)
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # likewise
    # By default gloo listens where this machine's name points to, which may be an address nobody reaches.
    options._devices = [ProcessGroupGloo.create_device(hostname=own_address(rank))]
    options._timeout = timeout
    return ProcessGroupGloo(store, rank.rank, rank.world_size, options)
