"""Replication: the batchers of a tensor-parallel group, which go through the same states on every rank.

The library's scheduler and its blocks depend on nothing but the calls that are made and the tokens that are sampled.
So the leader's batcher tells the followers each of its calls before it makes it, and each of its tokens; a follower's
batcher carries them out. What both compute for themselves is compared once a step.
"""

import itertools
import logging
import secrets
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from serve.core.request import pack_tokens
from serve.engines.transformers import messages
from serve.engines.transformers.block_chain import BlockChain
from serve.engines.transformers.followers import Followers
from serve.engines.transformers.leader_link import LeaderLink
from serve.engines.transformers.library import Batcher, BatchOptions, Entry
from serve.engines.transformers.scoring import PromptForward
from serve.errors import EngineDead

_log = logging.getLogger(__name__)


class LeadingBatcher(Batcher):
    """The batcher of rank 0. See `Batcher`.

    A step that fails on one rank leaves the others in the middle of a collective; nothing is left to be dropped.

    Args:
        followers: All other ranks.

    Raises:
        MemoryError: The cache does not fit the memory of all ranks.
        EngineDead, ConfigError: A follower is gone.
    """

    survives_failed_steps = False

    def __init__(
        self,
        model: Any,
        options: BatchOptions,
        choose: Callable[[torch.Tensor, list[str]], list[int]],
        on_match: Callable[[str, int], None],
        *,
        followers: Followers,
    ) -> None:
        self._followers = followers
        self._numbers = itertools.count()

        def choose_for_all(logits: torch.Tensor, names: list[str]) -> list[int]:
            token_ids = choose(logits, names)
            followers.tell(messages.Sampled(token_ids))
            return token_ids

        followers.tell(messages.MakeCache(options))
        try:
            super().__init__(model, options, choose_for_all, on_match)
        except (MemoryError, torch.OutOfMemoryError):
            followers.collect(messages.CacheMade)
            raise
        sizes = [made.total_blocks for made in followers.collect(messages.CacheMade)]
        if None in sizes:
            raise MemoryError(f"tensor rank {sizes.index(None) + 1} has no memory for it")
        if set(sizes) != {self.ledger.total_blocks}:
            raise EngineDead(f"tensor ranks made caches of {[self.ledger.total_blocks, *sizes]} blocks")

    def add(self, entry: Entry) -> None:
        """Let a sequence take part, on every rank."""
        prompt = pack_tokens(entry.chain.token_ids())
        order = messages.Add(entry.name, prompt, entry.chain.salt, entry.max_tokens, entry.stop_token_ids)
        self._followers.tell(order)
        super().add(entry)

    def cancel(self, name: str) -> None:
        """End a sequence, on every rank."""
        self._followers.tell(messages.Cancel(name))
        super().cancel(name)

    def step(self, on_scheduled: Callable[[list[tuple[str, int]]], None]) -> bool:
        """Compute one step, on every rank."""

        def compare_and_note(batch: list[tuple[str, int]]) -> None:
            self._followers.tell(messages.Scheduled(tuple(batch), *self.ledger.free_and_cached()))
            on_scheduled(batch)

        self._followers.tell(messages.Step())
        return super().step(compare_and_note)

    def scrub(self) -> None:
        """Forget all that is cached, on every rank."""
        self._followers.tell(messages.Scrub())
        super().scrub()

    def forget_cached(self) -> None:
        """Drop the content of all blocks that nobody uses, on every rank."""
        self._followers.tell(messages.ForgetCached())
        super().forget_cached()

    def begin_scoring(self, prompt: npt.NDArray[np.uint32], chunk_tokens: int) -> PromptForward:
        """Make a forward pass over a prompt, on every rank."""
        number = next(self._numbers)
        forward = _LeadingForward(self._model, prompt, chunk_tokens, number, self._followers)
        self._followers.tell(messages.BeginScoring(number, prompt.astype("<u4").tobytes(), chunk_tokens))
        return forward


class _LeadingForward(PromptForward):
    def __init__(
        self, model: Any, prompt: npt.NDArray[np.uint32], chunk_tokens: int, number: int, followers: Followers
    ) -> None:
        super().__init__(model, prompt, chunk_tokens)
        self._number = number
        self._followers = followers

    def advance(self) -> tuple[torch.Tensor, torch.Tensor]:
        self._followers.tell(messages.ScoreChunk(self._number))
        result = super().advance()
        if self.is_done:
            self.close()
        return result

    def close(self) -> None:
        self._followers.tell(messages.EndScoring(self._number))


class FollowingBatcher(Batcher):
    """The batcher of any other rank: carries out what the leader's did.

    Args:
        model: This rank's shard.
        options: The leader's.
        leader: Whose orders are still to come.
    """

    def __init__(self, model: Any, options: BatchOptions, leader: LeaderLink) -> None:
        self._leader = leader
        self._secret = secrets.token_bytes(32)  # block keys are compared within this rank only
        self._scoring: dict[int, PromptForward] = {}
        super().__init__(model, options, self._receive_tokens, lambda _name, _tokens: None)

    def carry_out(self, order: messages.Order) -> None:
        """Do what the leader does.

        Raises:
            EngineDead: This rank is not where the leader is, or the leader is gone.
        """
        match order:
            case messages.Step():
                self.step(self._compare)
                self.events.drain(self.ledger.shared.changes)  # nobody reads a follower's
            case messages.Add():
                self.add(self._entry(order))
            case messages.Cancel():
                self.cancel(order.name)
            case messages.Scrub():
                self.scrub()
            case messages.ForgetCached():
                self.forget_cached()
            case messages.BeginScoring():
                prompt = np.frombuffer(order.prompt, dtype="<u4")
                self._scoring[order.number] = self.begin_scoring(prompt, order.chunk_tokens)
            case messages.ScoreChunk():
                self._scoring[order.number].advance()
            case messages.EndScoring():
                self._scoring.pop(order.number).close()
            case _:
                raise _out_of_step(order, "nothing like it")

    def _entry(self, order: messages.Add) -> Entry:
        chain = BlockChain(order.prompt, self._options.tokens_per_block, order.salt, self._secret)
        return Entry(order.name, chain, order.max_tokens, order.stop_token_ids)

    def _compare(self, batch: list[tuple[str, int]]) -> None:
        own = messages.Scheduled(tuple(batch), *self.ledger.free_and_cached())
        order = self._leader.next_order()
        if order != own:
            raise _out_of_step(order, own)

    def _receive_tokens(self, _logits: torch.Tensor, names: list[str]) -> list[int]:
        order = self._leader.next_order()
        if not isinstance(order, messages.Sampled) or len(order.token_ids) != len(names):
            raise _out_of_step(order, f"tokens for {len(names)} sequences")
        for name, token_id in zip(names, order.token_ids, strict=True):
            self._entries[name].chain.append(token_id)
        return order.token_ids


def _out_of_step(order: messages.Order, expected: object) -> EngineDead:
    _log.error("the leader says %s; this rank expected %s", order, expected)
    return EngineDead(f"this rank is out of step with the leader: {type(order).__name__} where it expected otherwise")
