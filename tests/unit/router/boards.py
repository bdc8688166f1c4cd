"""Boards over replicas that a test speaks for."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from serve.core.blocks import block_hashes, chain_seed
from serve.core.kv_events import KvRemoved, KvStored
from serve.core.request import GenerateRequest, SamplingParams, pack_tokens
from serve.core.routing.load import LoadReport
from serve.core.routing.router import Router
from serve.core.routing.settings import parse_policy
from serve.router.board import RoutingBoard
from serve.router.hints import RouteHints
from serve.router.replica_feed import PlaneCounts
from serve.router.trace import RouteTrace
from serve.router.wire import Facts, PlaneAddress

SIZE = 16  # tokens per block


@dataclass
class FakeFeeds:
    """Says who is listened to.

    Attributes:
        counts: Of nothing.
        heard: Addresses by replica.
        closed: Whether it was closed.
    """

    counts: PlaneCounts = field(default_factory=PlaneCounts)
    heard: dict[str, PlaneAddress] = field(default_factory=dict)
    forgotten: list[str] = field(default_factory=list)
    closed: bool = False

    def listen(self, replica_id: str, address: PlaneAddress) -> None:
        """See `Feeds`."""
        assert replica_id not in self.heard
        self.heard[replica_id] = address

    def forget(self, replica_id: str) -> None:
        """See `Feeds`."""
        if self.heard.pop(replica_id, None) is not None:
            self.forgotten.append(replica_id)

    def close(self) -> None:
        """See `Feeds`."""
        self.closed = True


@dataclass
class Clock:
    """A time that a test sets."""

    now_s: float = 1000.0

    def __call__(self) -> float:
        """Return it."""
        return self.now_s


def metadata(tokens_per_block: int = SIZE, *, with_address: bool = True) -> dict[str, Any]:
    """Return what a replica says of itself."""
    facts = Facts("simulated", tokens_per_block, 1000, 8192)
    address = PlaneAddress("tcp://10.0.0.1:1", "tcp://10.0.0.1:2", "secret", 7, facts)
    said = address.to_metadata()
    return said if with_address else {name: said[name] for name in ("tokens_per_block", "total_blocks")}


def make_board(*replica_ids: str, policy: Any = "auto", model: str = "m") -> tuple[RoutingBoard, FakeFeeds, Clock]:
    """Return a board with idle replicas that are heard."""
    feeds, clock = FakeFeeds(), Clock()
    board = RoutingBoard(model, parse_policy(policy), lambda _: feeds, clock)
    if replica_ids:
        board.roster.update({name: metadata() for name in replica_ids})
        for name in replica_ids:
            board.roster.connected(name)
            board.roster.report(name, LoadReport(total_blocks=1000))
    return board, feeds, clock


def request(name: str, tokens: Sequence[int], max_tokens: int = 16, salt: str = "") -> GenerateRequest:
    """Return a sequence."""
    return GenerateRequest(name, "m", pack_tokens(tokens), SamplingParams(max_tokens=max_tokens), cache_salt=salt)


def prompt(number: int, blocks: int = 8) -> list[int]:
    """Return a prompt that no other number has, and a token more than whole blocks."""
    tokens: list[int] = np.random.default_rng(number).integers(0, 400, blocks * SIZE + 1).tolist()
    return tokens


def holds(board: RoutingBoard, replica_id: str, tokens: Sequence[int], salt: str = "", tier: int = 0) -> None:
    """Let a replica say that it holds a prompt."""
    seed = chain_seed(salt)
    hashes = tuple(block_hashes(np.array(tokens, np.uint32), SIZE, seed).tolist())
    board.roster.apply(replica_id, [KvStored(hashes, seed, tier)])


def evicts(board: RoutingBoard, replica_id: str, tokens: Sequence[int]) -> None:
    """Let a replica say that it holds a prompt no more."""
    board.roster.apply(replica_id, [KvRemoved(tuple(block_hashes(np.array(tokens, np.uint32), SIZE).tolist()))])


def announce(board: RoutingBoard, sequence: GenerateRequest, hints: RouteHints | None = None) -> RouteTrace:
    """Open a sequence at a board, as the desk does."""
    trace = RouteTrace(sequence, hints or RouteHints("request"), 999.0)
    board.open(trace)
    return trace


def first_choice(board: RoutingBoard, sequence: GenerateRequest, refused_by: str = "") -> str:
    """Return where a sequence should go."""
    choice = board.choose(sequence, refused_by)
    assert choice is not None
    return choice.best[0]


def heard(board: RoutingBoard) -> tuple[int, int]:
    """Return how many replicas are heard, and how many are not."""
    return board.roster.heard, len(board.roster) - board.roster.heard


def router_of(board: RoutingBoard) -> Router:
    """Return what decides."""
    assert board.roster.router is not None
    return board.roster.router
