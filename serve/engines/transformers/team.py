"""Team: what the leader of a tensor-parallel group has of it, from the meeting of the ranks to their end."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import transformers

from serve.engines.transformers.collectives import TensorGroup
from serve.engines.transformers.followers import Followers, meet
from serve.engines.transformers.library import MakeBatcher
from serve.engines.transformers.loading import LoadedModel, checkpoint_fingerprint, choose_device, load_model
from serve.engines.transformers.messages import Loaded
from serve.engines.transformers.rendezvous import TensorRank, visit_store
from serve.engines.transformers.replication import LeadingBatcher
from serve.engines.transformers.settings import TransformersSettings
from serve.errors import ConfigError, RayTRTError

_log = logging.getLogger(__name__)


def software() -> str:
    """Return the releases that have to be the same on all ranks."""
    return f"transformers {transformers.__version__}, torch {torch.__version__}"


class Team:
    """The ranks of one model, as rank 0 sees them. For the engine's thread, but for `abort` and `dismiss`.

    Args:
        rank: The leader's.
        settings: Of the engine.
        on_loss: Called, on any thread, when the group cannot go on.
        is_stopping: Asked while waiting for the followers to come.

    Raises:
        ConfigError: The ranks do not fit together, or there is no device for this one.
        EngineDead: Followers have not come.
    """

    def __init__(
        self,
        rank: TensorRank,
        settings: TransformersSettings,
        on_loss: Callable[[RayTRTError], None],
        is_stopping: Callable[[], bool],
    ) -> None:
        self._on_loss = on_loss
        self._group: TensorGroup | None = None
        device = choose_device(settings, rank.device_index)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store = visit_store(rank)
        self._followers: Followers = meet(rank, store, software(), self._lose, is_stopping)
        _log.info("all %d tensor ranks have come", rank.world_size)
        try:
            self._group = TensorGroup(rank, store, device, settings.max_step_s)
        except Exception as exc:
            error = self._followers.verdict(ConfigError(f"the tensor ranks cannot reach each other: {exc}"))
            self.dismiss(str(error))
            raise error from exc

    @property
    def make_batcher(self) -> MakeBatcher:
        """Makes a batcher on every rank."""
        return partial(LeadingBatcher, followers=self._followers)

    def load(self, model_dir: Path, settings: TransformersSettings) -> LoadedModel:
        """Load this rank's shard, and wait for the others'; with as many KV blocks as all have room for.

        Raises:
            ConfigError: A rank cannot load it, or has another checkpoint.
            EngineDead: A rank is gone.
        """
        loaded = load_model(model_dir, settings, self._group)
        own = checkpoint_fingerprint(model_dir)
        answers = self._followers.collect(Loaded)
        for rank, answer in enumerate(answers, start=1):
            if answer.checkpoint != own:
                raise ConfigError(
                    f"model: {model_dir} holds another checkpoint for tensor rank {rank} than for rank 0; copy the "
                    "same one to every node"
                )
        return replace(loaded, num_blocks=min(loaded.num_blocks, *(answer.num_blocks for answer in answers)))

    def verdict(self, error: RayTRTError) -> RayTRTError:
        """Return why the group really ended, if a follower has something to say about it; else `error`."""
        return self._followers.verdict(error)

    def abort(self) -> None:
        """End the collectives; what is being computed together fails. From any thread."""
        if self._group is not None:
            self._group.abort()

    def dismiss(self, reason: str | None) -> None:
        """End the followers; with the reason, if they did not end as they should. Safe to call twice."""
        self._followers.dismiss(reason)

    def _lose(self, error: RayTRTError) -> None:
        self._on_loss(error)
        self.abort()
