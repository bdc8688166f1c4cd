"""PrefixIndex against a naive model: equal while all fits; then never more than the truth, nor than the cap."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.core.blocks import ROOT, block_hashes
from serve.core.kv_events import DISK, GPU, HOST, KvEvent, KvRemoved, KvSnapshot, KvStored
from serve.core.prefix_index import IndexMatch, PrefixIndex

TIERS = (GPU, GPU, HOST, DISK)
# Many share the low bits by which a hash table would find its bucket, and one of them is 0.
UNIVERSE = [low + (high << 40) for high in range(40) for low in range(5)]


@dataclass
class Naive:
    """Tier of each block that each replica holds."""

    replicas: dict[str, dict[int, int]] = field(default_factory=dict)

    def apply(self, replica_id: str, event: KvEvent) -> None:
        blocks = self.replicas[replica_id]
        match event:
            case KvStored():
                blocks.update(dict.fromkeys(event.block_hashes, event.tier))
            case KvRemoved():
                for block in event.block_hashes:
                    blocks.pop(block, None)
            case KvSnapshot():
                blocks.clear()
                tiers = event.tiers or (GPU,) * len(event.block_hashes)
                blocks.update(zip(event.block_hashes, tiers, strict=True))

    def match(self, replica_id: str, hashes: Sequence[int]) -> tuple[int, int, int]:
        counts = [0, 0, 0]
        for block in hashes:
            tier = self.replicas[replica_id].get(block)
            if tier is None:
                break
            counts[tier] += 1
        return sum(counts), counts[HOST], counts[DISK]

    def blocks(self) -> set[int]:
        return {block for blocks in self.replicas.values() for block in blocks}


def counts(found: IndexMatch, row: int) -> tuple[int, int, int]:
    return int(found.hit[row]), int(found.host[row]), int(found.disk[row])


def some_blocks(rng: random.Random, universe: Sequence[int]) -> tuple[int, ...]:
    """Some of them, mostly in the order of the universe, now and then one twice."""
    size = rng.choice([1, 2, 5, 20, 60, 150])
    start = rng.randrange(len(universe))
    blocks = [universe[(start + number) % len(universe)] for number in range(min(size, len(universe)))]
    if rng.random() < 0.2:
        rng.shuffle(blocks)
    if rng.random() < 0.1:
        blocks.append(blocks[0])
    return tuple(blocks)


def random_event(rng: random.Random, universe: Sequence[int]) -> KvEvent:
    blocks = some_blocks(rng, universe)
    kind = rng.random()
    if kind < 0.5:
        return KvStored(blocks, rng.choice(universe), rng.choice(TIERS))
    if kind < 0.9:
        return KvRemoved(blocks)
    blocks = tuple(dict.fromkeys(blocks)) if rng.random() < 0.9 else ()
    tiers = tuple(rng.choice(TIERS) for _ in blocks) if rng.random() < 0.5 else ()
    return KvSnapshot(blocks, tuple(rng.choice(universe) for _ in blocks), tiers)


@dataclass
class Pair:
    """An index and the model, given the same."""

    index: PrefixIndex
    naive: Naive = field(default_factory=Naive)
    named: int = 0

    def add(self) -> None:
        self.named += 1
        rows = self.rows()
        self.naive.replicas[f"r{self.named}"] = {}
        assert self.index.add(f"r{self.named}") not in rows.values()
        assert self.rows().items() >= rows.items()

    def remove(self, replica_id: str) -> None:
        del self.naive.replicas[replica_id]
        self.index.remove(replica_id)

    def apply(self, replica_id: str, event: KvEvent) -> None:
        self.naive.apply(replica_id, event)
        self.index.apply(self.index.row(replica_id), event)

    def rows(self) -> dict[str, int]:
        return {name: self.index.row(name) for name in self.naive.replicas}

    def run(self, rng: random.Random, steps: int, universe: Sequence[int]) -> Iterable[Sequence[int]]:
        """Do something at random, many times; after each, yield a prompt."""
        for _ in range(steps):
            names = list(self.naive.replicas)
            if not names or (len(names) < 12 and rng.random() < 0.1):
                self.add()
            elif rng.random() < 0.05:
                self.remove(rng.choice(names))
            else:
                self.apply(rng.choice(names), random_event(rng, universe))
            yield some_blocks(rng, universe)


@given(seed=st.integers(0, 2**32), steps=st.integers(1, 60))
def test_equals_the_model_while_everything_fits(seed: int, steps: int) -> None:
    rng = random.Random(seed)
    pair = Pair(PrefixIndex(max_blocks=rng.choice([len(UNIVERSE) * 3, 40_000])))
    for prompt in pair.run(rng, steps, UNIVERSE):
        hashes = np.array(prompt, dtype=np.uint64) if rng.random() < 0.5 else prompt
        found = pair.index.match(hashes)
        assert {name: counts(found, row) for name, row in pair.rows().items()} == {
            name: pair.naive.match(name, prompt) for name in pair.naive.replicas
        }
        free = set(range(pair.index.num_rows)) - set(pair.rows().values())
        assert all(counts(found, row) == (0, 0, 0) for row in free)
        assert len(pair.index) >= len(pair.naive.blocks())


@given(seed=st.integers(0, 2**32), steps=st.integers(1, 60), max_blocks=st.integers(1, 150))
def test_never_claims_more_than_the_truth_nor_keeps_more_than_the_cap(seed: int, steps: int, max_blocks: int) -> None:
    rng = random.Random(seed)
    pair = Pair(PrefixIndex(max_blocks))
    for prompt in pair.run(rng, steps, UNIVERSE):
        found = pair.index.match(prompt)
        assert len(pair.index) <= max_blocks
        for name, row in pair.rows().items():
            hit, host, disk = counts(found, row)
            assert hit <= pair.naive.match(name, prompt)[0]
            assert 0 <= host + disk <= hit


@given(seed=st.integers(0, 2**32))
def test_what_removed_replicas_held_is_forgotten_in_the_end(seed: int) -> None:
    rng = random.Random(seed)
    pair = Pair(PrefixIndex(1000))
    for _ in pair.run(rng, 60, UNIVERSE):
        pass
    pair.add()
    for _ in range(10):  # events that change nothing give it time to
        pair.apply(f"r{pair.named}", KvRemoved((12345,)))
    assert len(pair.index) == len(pair.naive.blocks())


def chain(seed: int, blocks: int) -> tuple[int, ...]:
    return tuple(block_hashes(np.random.default_rng(seed).integers(0, 1000, 2 * blocks, dtype=np.uint32), 2).tolist())


def test_the_cap_forgets_ends_of_chains_first() -> None:
    index = PrefixIndex(max_blocks=200)
    row = index.add("a")
    for seed in range(3):
        index.apply(row, KvStored(chain(seed, 100), ROOT))
    assert len(index) == 200
    assert [int(index.match(chain(seed, 100)).hit[row]) for seed in range(3)] == [0, 100, 100]
    index.apply(row, KvStored(chain(3, 50), ROOT))
    assert [int(index.match(chain(seed, 100)).hit[row]) for seed in (1, 2)] == [50, 100]


def test_the_cap_forgets_what_was_not_asked_for() -> None:
    index = PrefixIndex(max_blocks=200)
    row = index.add("a")
    index.apply(row, KvStored(chain(0, 100), ROOT))
    index.apply(row, KvStored(chain(1, 100), ROOT))
    index.match(chain(0, 100))
    index.apply(row, KvStored(chain(2, 100), ROOT))
    assert [int(index.match(chain(seed, 100)).hit[row]) for seed in range(3)] == [100, 0, 100]


def test_the_cap_keeps_the_ancestors_of_what_was_stored() -> None:
    # Other gateways route the later turns of a conversation: here, nobody asks for it.
    index = PrefixIndex(max_blocks=200)
    row = index.add("a")
    turns = [chain(0, 100)[start : start + 20] for start in range(0, 100, 20)]
    parent = ROOT
    for seed, turn in enumerate(turns, start=1):
        index.apply(row, KvStored(turn, parent))
        parent = turn[-1]
        index.apply(row, KvStored(chain(seed, 60), ROOT))
    assert int(index.match(chain(0, 100)).hit[row]) == 100


def test_a_chain_longer_than_the_cap_keeps_its_beginning() -> None:
    index = PrefixIndex(max_blocks=64)
    row = index.add("a")
    index.apply(row, KvStored(chain(0, 500), ROOT))
    assert int(index.match(chain(0, 500)).hit[row]) >= 60


def test_rows_stay_while_others_come_and_go() -> None:
    index = PrefixIndex()
    rows = [index.add(f"r{number}") for number in range(5)]
    index.apply(rows[4], KvStored((1, 2), 0))
    for number in range(100):
        index.remove(f"r{number % 4}")
        assert index.add(f"r{number % 4}") in rows
    assert index.num_rows == 5
    assert index.match((1, 2)).hit.tolist() == [2 if row == rows[4] else 0 for row in range(5)]


def test_a_replica_of_the_same_name_twice_is_refused() -> None:
    index = PrefixIndex()
    index.add("a")
    with pytest.raises(ValueError, match="remove it first"):
        index.add("a")


@pytest.mark.parametrize("blocks", [40_000, 700_000])
def test_many_blocks_move_to_larger_tables(blocks: int) -> None:
    index = PrefixIndex(max_blocks=1_000_000)
    row = index.add("a")
    hashes = tuple(np.random.default_rng(0).integers(0, 2**64, blocks, dtype=np.uint64).tolist())
    index.apply(row, KvStored(hashes[:10], 0))
    index.apply(row, KvSnapshot(hashes, (0, *hashes[:-1])))
    assert len(index) == blocks
    assert int(index.match(hashes).hit[row]) == blocks
    index.apply(row, KvRemoved(hashes[blocks // 2 :]))
    assert len(index) == blocks // 2
    assert int(index.match(hashes).hit[row]) == blocks // 2
