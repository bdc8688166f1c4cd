"""Flights: the requests that an engine has, and what they amount to."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from serve.core.delta_inbox import DeltaInbox
from serve.core.request import GenerateRequest, TokenDelta
from serve.engines.trtllm.stats import OwnCounts
from serve.engines.trtllm.stream import OutputReader


@dataclass(eq=False)
class Flight:
    """One request in the engine.

    Attributes:
        name: Ours; a request id may come again before the engine has forgotten it.
        request: What was asked for.
        output: The library's `RequestOutput`.
        reader: Turns it into deltas.
        inbox: Where these wait.
        has_begun: Its first delta was told.
        is_left: Nobody reads it any more, and the engine was told to abort it.
        is_over: The engine has ended it.
        blocks: KV blocks it can hold.
        task: What reads it.
    """

    name: str
    request: GenerateRequest
    output: Any
    reader: OutputReader
    inbox: DeltaInbox = field(default_factory=DeltaInbox)
    has_begun: bool = False
    is_left: bool = False
    is_over: bool = False
    blocks: int = 0
    task: asyncio.Task[None] | None = None


class Flights:
    """All requests in flight, and running totals. Lives on the event loop.

    Args:
        tokens_per_block: Size of a KV block.
    """

    def __init__(self, tokens_per_block: int) -> None:
        self._tokens_per_block = tokens_per_block
        self._all: dict[str, Flight] = {}
        self._by_request: dict[str, Flight] = {}
        self._begun = 0
        self._blocks = 0
        self._queued_tokens = 0
        self._totals = {"prompt_tokens": 0, "cached_prompt_tokens": 0, "generated_tokens": 0}

    def __iter__(self) -> Iterator[Flight]:
        """Yield every flight; the collection may change meanwhile."""
        return iter(list(self._all.values()))

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._all)

    def has(self, request_id: str) -> bool:
        """Return whether somebody reads a request of this id."""
        return request_id in self._by_request

    def add(self, flight: Flight) -> None:
        """Take in a request that the engine has got."""
        self._all[flight.name] = flight
        self._by_request[flight.request.request_id] = flight
        self._queued_tokens += flight.request.prompt_tokens
        self._grow(flight)

    def told(self, flight: Flight, delta: TokenDelta) -> None:
        """Take note of what the engine told of a request."""
        if delta.prefill is not None:
            self._begin(flight)
            self._totals["prompt_tokens"] += flight.request.prompt_tokens
            self._totals["cached_prompt_tokens"] += delta.prefill.cached_tokens
        self._totals["generated_tokens"] += len(delta.token_ids)
        self._grow(flight)

    def leave(self, flight: Flight) -> None:
        """Its reader is gone: the id may be used again, though the engine may still hold its blocks."""
        flight.is_left = True
        if self._by_request.get(flight.request.request_id) is flight:
            del self._by_request[flight.request.request_id]

    def remove(self, flight: Flight) -> None:
        """Forget a request that the engine has ended. Harmless if it was forgotten."""
        self.leave(flight)
        if self._all.pop(flight.name, None) is None:
            return
        if flight.has_begun:
            self._begun -= 1
        else:
            self._queued_tokens -= flight.request.prompt_tokens
        self._blocks -= flight.blocks

    def counts(self) -> OwnCounts:
        """Return what all of them amount to."""
        return OwnCounts(
            submitted=len(self._all) - self._begun,
            streaming=self._begun,
            queued_prefill_tokens=self._queued_tokens,
            blocks_at_most=self._blocks,
            **self._totals,
        )

    def _begin(self, flight: Flight) -> None:
        flight.has_begun = True
        self._begun += 1
        self._queued_tokens -= flight.request.prompt_tokens

    def _grow(self, flight: Flight) -> None:
        tokens = flight.request.prompt_tokens + flight.reader.generated
        blocks = -(-tokens // self._tokens_per_block)
        self._blocks += blocks - flight.blocks
        flight.blocks = blocks
