"""BlockPool against a naive model that keeps every block, and knows its prefix as tokens."""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from serve.core.kv_events import KvRemoved, KvStored
from serve.engines.simulated.blocks import BlockPool

TOTAL = 12
ROOT = 7
Prefix = tuple[int, ...]  # one number a block: what is in it


def hash_of(prefix: Prefix) -> int:
    return hash((ROOT, prefix)) if prefix else ROOT


def chain_of(prefix: Prefix) -> list[int]:
    return [hash_of(prefix[: i + 1]) for i in range(len(prefix))]


@dataclass
class Holder:
    """A sequence: its blocks' content, how many of them are filled, and how many it holds in all."""

    prefix: Prefix
    filled: int
    held: int
    own: set[Prefix] = field(default_factory=set)


class PoolMachine(RuleBasedStateMachine):
    """Sequences start, fill blocks, grow and end in any order."""

    holders = Bundle("holders")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(TOTAL)
        self.users: dict[Prefix, int] = {}
        self.released: dict[Prefix, int] = {}  # idle prefixes, and when they were released
        self.open = 0
        self.clock = 0
        self.told: dict[int, int] = {}

    def room(self) -> int:
        return TOTAL - len(self.users) - self.open

    def take_open(self, count: int) -> None:
        self.pool.open(count)
        self.open += count
        while len(self.users) + self.open + len(self.released) > TOTAL:
            held = {*self.users, *self.released}
            leaves = [p for p in self.released if not any(q[:-1] == p for q in held)]
            del self.released[min(leaves, key=lambda p: self.released[p])]

    def use(self, prefix: Prefix) -> None:
        self.released.pop(prefix, None)
        self.users[prefix] = self.users.get(prefix, 0) + 1

    @rule(target=holders, prefix=st.lists(st.integers(0, 1), min_size=1, max_size=5).map(tuple))
    def start(self, prefix: Prefix) -> Holder:
        chain = chain_of(prefix)
        held = [p for p in (prefix[: i + 1] for i in range(len(prefix))) if p in self.users or p in self.released]
        hit = self.pool.hit_blocks(chain, len(chain))
        assert hit == len(held)
        assert self.pool.hit_blocks(chain, 2) == min(2, hit)
        assert self.pool.in_use(chain, hit) == sum(p in self.users for p in held)
        if len(prefix) - sum(p in self.users for p in held) > self.room():
            return Holder((), 0, 0)
        self.pool.use(chain, hit)
        for p in held:
            self.use(p)
        self.take_open(len(prefix) - hit)
        return Holder(prefix, hit, len(prefix))

    @rule(holder=holders, count=st.integers(1, 3))
    def fill(self, holder: Holder, count: int) -> None:
        full = min(holder.filled + count, holder.held)
        if full == holder.filled:
            return
        chain = chain_of(holder.prefix)
        self.pool.fill(chain[holder.filled : full], hash_of(holder.prefix[: holder.filled]))
        for i in range(holder.filled, full):
            self.use(holder.prefix[: i + 1])
            self.open -= 1
        holder.filled = full

    @precondition(lambda self: self.room() > 0)
    @rule(holder=holders, content=st.integers(0, 1))
    def grow(self, holder: Holder, content: int) -> None:
        if holder.held and holder.filled == holder.held:
            holder.prefix += (content,)
            holder.held += 1
            self.take_open(1)

    @rule(holder=consumes(holders))
    def end(self, holder: Holder) -> None:
        self.pool.give_back(chain_of(holder.prefix), holder.filled, holder.held - holder.filled)
        self.open -= holder.held - holder.filled
        for i in reversed(range(holder.filled)):
            prefix = holder.prefix[: i + 1]
            self.users[prefix] -= 1
            if not self.users[prefix]:
                del self.users[prefix]
                self.clock += 1
                self.released[prefix] = self.clock

    @invariant()
    def counts_are_those_of_the_model(self) -> None:
        assert self.pool.used_blocks == len(self.users) + self.open
        assert self.pool.idle_blocks == len(self.released)
        assert self.pool.room_blocks == self.room() >= 0
        assert self.pool.used_blocks + self.pool.idle_blocks <= TOTAL

    @invariant()
    def content_is_that_of_the_model_and_of_the_events(self) -> None:
        for event in self.pool.take_events():
            if isinstance(event, KvStored):
                parent = event.parent
                for block_hash in event.block_hashes:
                    assert block_hash not in self.told, "stored twice"
                    assert parent == ROOT or parent in self.told, "stored before its parent"
                    self.told[block_hash] = parent
                    parent = block_hash
            else:
                assert isinstance(event, KvRemoved)
                for block_hash in event.block_hashes:
                    assert block_hash not in self.told.values(), "removed before its child"
                    del self.told[block_hash]
        truth = {hash_of(prefix): hash_of(prefix[:-1]) for prefix in (*self.users, *self.released)}
        assert self.told == truth
        assert self.pool.content() == frozenset(truth)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_more_than_there_is_cannot_be_had() -> None:
    pool = BlockPool(4)
    pool.open(3)
    with pytest.raises(MemoryError, match="2 KV blocks wanted, 1 can be had"):
        pool.open(2)


def test_events_of_one_step_are_joined() -> None:
    pool = BlockPool(8)
    pool.open(3)
    pool.fill([1, 2], ROOT)
    pool.fill([3], 2)
    assert pool.take_events() == [KvStored((1, 2, 3), ROOT)]
    pool.give_back([1, 2, 3], 3, 0)
    pool.open(6)
    pool.open(1)
    assert pool.take_events() == [KvRemoved((3, 2))]
