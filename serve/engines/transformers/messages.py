"""What the ranks of a tensor-parallel group say to each other: the leader's decisions, and the followers' answers.

A follower makes the same calls of the library as the leader, in the same order, so both have the same sequences in the
same batches. What the leader alone can know (requests, cancellations, the tokens it sampled) is told; what both compute
(schedule, blocks) is compared.
"""

from typing import Literal

import msgspec

from serve.engines.transformers.library import BatchOptions


class Joined(msgspec.Struct, tag=True):
    """A follower has come to the meeting; `token` is the leader's, from the store."""

    token: str
    rank: int
    software: str


class Loaded(msgspec.Struct, tag=True):
    """A follower has its shard of the weights, and room for so many KV blocks."""

    checkpoint: str
    num_blocks: int


class CacheMade(msgspec.Struct, tag=True):
    """A follower has made its cache, or there was no memory for it."""

    total_blocks: int | None


class Failed(msgspec.Struct, tag=True):
    """A follower ends; by whom it has to be mended."""

    who: Literal["operator", "engine"]
    text: str


class MakeCache(msgspec.Struct, tag=True):
    """Make a cache, in the place of the one before, if there was one."""

    options: BatchOptions


class Add(msgspec.Struct, tag=True):
    """A sequence takes part from the next step on; see `library.Entry`."""

    name: str
    prompt: bytes
    salt: str
    max_tokens: int
    stop_token_ids: tuple[int, ...]


class Cancel(msgspec.Struct, tag=True):
    """A sequence is to be forgotten."""

    name: str


class Step(msgspec.Struct, tag=True):
    """Prepare the next step."""


class Scheduled(msgspec.Struct, tag=True):
    """What the leader prepared: each sequence with its number of tokens, and the blocks that are left.

    Compared before the forward pass, whose collectives would mix up two different batches.
    """

    batch: tuple[tuple[str, int], ...]
    free: int
    cached: int


class Sampled(msgspec.Struct, tag=True):
    """The tokens of the step, one for each sequence that gets one, in the order of the batch."""

    token_ids: list[int]


class Scrub(msgspec.Struct, tag=True):
    """See `library.Batcher.scrub`."""


class ForgetCached(msgspec.Struct, tag=True):
    """See `library.Batcher.forget_cached`."""


class BeginScoring(msgspec.Struct, tag=True):
    """A prompt is going to be scored, in chunks of so many tokens."""

    number: int
    prompt: bytes
    chunk_tokens: int


class ScoreChunk(msgspec.Struct, tag=True):
    """Compute the next chunk of a prompt that is being scored."""

    number: int


class EndScoring(msgspec.Struct, tag=True):
    """Forget a prompt that was being scored."""

    number: int


class Stop(msgspec.Struct, tag=True):
    """The group ends; with the reason, if it is not that it was asked to."""

    reason: str | None


Answer = Joined | Loaded | CacheMade | Failed
Order = (
    MakeCache
    | Add
    | Cancel
    | Step
    | Scheduled
    | Sampled
    | Scrub
    | ForgetCached
    | BeginScoring
    | ScoreChunk
    | EndScoring
    | Stop
)
