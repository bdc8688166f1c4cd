"""EventTranslator against a naive model: never a block that is not there, and all of them if no event is dropped."""

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.core.blocks import ROOT, block_hashes, chain_seed
from serve.core.kv_events import GPU, HOST, KvRemoved
from serve.engines.trtllm.block_key import block_key, salt_id_of
from serve.engines.trtllm.chain_seeds import ChainSeeds
from serve.engines.trtllm.kv_events import EventTranslator, Translation
from tests.unit.engines.trtllm.radix_cache import Event, RadixCache

SIZE = 4
prompts = st.lists(st.sampled_from([0, 0, 0, 1]), min_size=SIZE, max_size=3 * SIZE + 2)
operations = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from(["store", "store", "remove", "offload", "onboard"]), prompts),
    max_size=25,
)
lossy_operations = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.sampled_from(["store", "store", "remove", "remove", "offload", "onboard"]),
        prompts,
        st.sampled_from([False, False, True]),  # its events are lost
    ),
    min_size=3,
    max_size=25,
)


@dataclass
class Index:
    """A consumer's copy: of each block, its parent and its tier."""

    blocks: dict[int, tuple[int, int]] = field(default_factory=dict)

    def apply(self, translation: Translation) -> None:
        if translation.is_afresh:
            self.blocks = {}
        for event in translation.events:
            if isinstance(event, KvRemoved):
                for block_hash in event.block_hashes:
                    del self.blocks[block_hash]  # a KeyError: something was removed that nobody told of
                continue
            parent = event.parent
            for block_hash in event.block_hashes:
                self.blocks[block_hash] = (parent, event.tier)
                parent = block_hash


def act(cache: RadixCache, kind: str, choice: list[int]) -> None:
    """Do something that is possible, as `choice` says."""
    number = sum(bit << i for i, bit in enumerate(choice))
    if kind == "store":
        cache.store(choice)
    elif kind == "remove" and (leaves := cache.leaves()):
        cache.remove([leaves[number % len(leaves)]])
    elif kind in ("offload", "onboard") and cache.nodes:
        cache.move(list(cache.nodes)[number % len(cache.nodes)], int(kind == "offload"))


def merged(caches: list[RadixCache]) -> dict[int, tuple[int, int]]:
    """A block is there while any rank has it; its tier is the best."""
    found: dict[int, tuple[int, int]] = {}
    for cache in caches:
        for block_hash, (parent, tier) in cache.truth().items():
            old = found.get(block_hash, (parent, tier))
            found[block_hash] = (parent, min(old[1], tier))
    return found


@given(acts=operations, ranks=st.integers(1, 2), reads=st.sets(st.integers(0, 25)), twice=st.booleans())
def test_without_drops_the_index_is_the_cache(
    acts: list[tuple[int, str, list[int]]], ranks: int, reads: set[int], twice: bool
) -> None:
    caches = [RadixCache(SIZE, rank if ranks > 1 else None) for rank in range(ranks)]
    translator, index, told = EventTranslator(SIZE, ChainSeeds(SIZE)), Index(), [0] * ranks
    for i, (who, kind, choice) in enumerate(acts):
        act(caches[who % ranks], kind, choice)
        if i not in reads and i < len(acts) - 1:
            continue
        for rank, cache in enumerate(caches):
            begin = max(1, told[rank] - 2) if twice and told[rank] else told[rank]
            index.apply(translator.translate(copy.deepcopy(cache.events[begin:])))
            told[rank] = len(cache.events)
        assert index.blocks == merged(caches)
    assert translator.counts.gaps == translator.counts.malformed == 0


@given(acts=lossy_operations)
def test_trap_2_7_dropped_events_never_leave_a_wrong_index(acts: list[tuple[int, str, list[int], bool]]) -> None:
    caches = [RadixCache(SIZE, rank) for rank in range(2)]
    translator, index, told, is_behind = EventTranslator(SIZE, ChainSeeds(SIZE)), Index(), [0, 0], [False, False]
    for who, kind, choice, is_lost in acts:
        act(caches[who], kind, choice)
        for rank, cache in enumerate(caches):
            fresh = cache.events[told[rank] :]
            told[rank] = len(cache.events)
            if fresh:  # a gap shows with the next event that arrives
                is_behind[rank] = is_lost
                index.apply(translator.translate([] if is_lost else fresh))
        if not any(is_behind):
            truth = merged(caches)
            assert index.blocks.keys() <= truth.keys()
            assert all(parent == truth[block][0] for block, (parent, _) in index.blocks.items())
            assert all(tier >= truth[block][1] for block, (_, tier) in index.blocks.items())


def test_after_a_gap_what_is_stored_behind_known_blocks_brings_them_back() -> None:
    cache, index = RadixCache(SIZE), Index()
    translator = EventTranslator(SIZE, ChainSeeds(SIZE))
    system = list(range(3 * SIZE))
    cache.store(system)
    cache.store([50] * SIZE)
    index.apply(translator.translate(cache.events))
    read = len(cache.events)
    cache.store([60] * SIZE)  # lost
    cache.store([70] * SIZE)
    index.apply(translator.translate(cache.events[read + 1 :]))
    assert set(index.blocks) == set(block_hashes([70] * SIZE, SIZE).tolist())
    assert (translator.counts.gaps, translator.counts.lost) == (1, 1)
    read = len(cache.events)
    cache.store([*system, *[80] * SIZE])
    index.apply(translator.translate(cache.events[read:]))
    hashes = block_hashes([*system, *[80] * SIZE], SIZE).tolist()
    assert set(hashes) <= set(index.blocks)
    assert index.blocks[hashes[0]] == (ROOT, GPU)


def test_a_block_that_was_removed_after_a_gap_does_not_come_back() -> None:
    cache, index = RadixCache(SIZE), Index()
    translator = EventTranslator(SIZE, ChainSeeds(SIZE))
    cache.store(list(range(2 * SIZE)))
    index.apply(translator.translate(cache.events))
    read = len(cache.events)
    cache.store([60] * SIZE)  # lost
    (leaf,) = [key for key in cache.leaves() if cache.nodes[key].path[0] == 0]
    cache.remove([leaf])
    index.apply(translator.translate(cache.events[read + 1 :]))
    assert index.blocks == {}


def test_a_chain_behind_unknown_blocks_is_counted_and_not_published() -> None:
    cache, index = RadixCache(SIZE), Index()
    translator = EventTranslator(SIZE, ChainSeeds(SIZE))
    cache.store(list(range(SIZE)))  # lost
    cache.store(list(range(3 * SIZE)))
    index.apply(translator.translate([cache.events[0], *cache.events[2:]]))
    assert index.blocks == {}
    assert translator.counts.unknown == 2


def test_trap_2_7_host_blocks_change_their_tier() -> None:
    cache, index = RadixCache(SIZE), Index()
    cache.store(list(range(2 * SIZE)))
    (leaf,) = cache.leaves()
    cache.move(leaf, HOST)
    translator = EventTranslator(SIZE, ChainSeeds(SIZE))
    index.apply(translator.translate(cache.events))
    assert sorted(tier for _, tier in index.blocks.values()) == [GPU, HOST]
    assert translator.pool_blocks == (100, 50)


def test_trap_2_7_only_the_largest_window_counts() -> None:
    small, large, index = RadixCache(SIZE, window=8), RadixCache(SIZE, window=64), Index()
    tokens = list(range(2 * SIZE))
    small.store(tokens)
    large.store(tokens)
    small.remove(small.leaves())
    created, stored, removed = small.events
    events = [created, *large.events[:1], stored, *large.events[1:], removed]
    for event_id, event in enumerate(events):
        event["event_id"] = event_id
    translator = EventTranslator(SIZE, ChainSeeds(SIZE))
    index.apply(translator.translate(events))
    assert index.blocks == large.truth()


def test_trap_2_7_a_block_is_there_while_any_attention_dp_rank_has_it() -> None:
    caches, index = [RadixCache(SIZE, rank) for rank in (0, 1)], Index()
    translator = EventTranslator(SIZE, ChainSeeds(SIZE))
    for cache in caches:
        cache.store(list(range(SIZE)))
        index.apply(translator.translate(cache.events))
    (block,) = index.blocks
    caches[0].remove(caches[0].leaves())
    index.apply(translator.translate(caches[0].events[-1:]))
    assert list(index.blocks) == [block]
    caches[1].remove(caches[1].leaves())
    index.apply(translator.translate(caches[1].events[-1:]))
    assert index.blocks == {}


def test_trap_2_8_a_partial_block_is_not_published() -> None:
    cache, index = RadixCache(SIZE), Index()
    cache.store(list(range(SIZE + 1)))
    index.apply(EventTranslator(SIZE, ChainSeeds(SIZE)).translate(cache.events))
    assert set(index.blocks) == set(block_hashes(list(range(SIZE)), SIZE).tolist())


def test_trap_2_7_salted_chains_are_published_under_their_salt() -> None:
    def digest(data: bytes) -> bytes:
        return data.ljust(8, b"-")  # stands for BLAKE3

    seeds = ChainSeeds(SIZE, digest)
    prompt = list(range(2 * SIZE + 1))
    seeds.begin("1", np.array(prompt, dtype=np.uint32), "tenant")
    cache, index = RadixCache(SIZE, first_salt_id=salt_id_of(digest(b"tenant"))), Index()
    cache.store(prompt[:-1])
    index.apply(EventTranslator(SIZE, seeds).translate(cache.events))
    assert set(index.blocks) == set(block_hashes(prompt, SIZE, chain_seed("tenant")).tolist())


def test_an_engine_that_begins_again_makes_all_before_void() -> None:
    old, new, index = RadixCache(SIZE), RadixCache(SIZE), Index()
    translator = EventTranslator(SIZE, ChainSeeds(SIZE))
    old.store(list(range(SIZE)))
    new.store([9] * SIZE)
    for cache in (old, new):
        index.apply(translator.translate(cache.events))
    assert index.blocks == new.truth()


def test_newest_hashes_are_strings_and_blocks_tell_their_salt() -> None:
    tokens = [[{"token_id": i + SIZE * block} for i in range(SIZE)] for block in range(2)]
    blocks: list[Event] = [
        {"block_hash": "ab", "tokens": tokens[0], "cache_level": 0, "cache_salt": "tenant", "mm_keys": []},
        {"block_hash": "cd", "tokens": tokens[1], "cache_level": 0},
    ]
    events: list[Event] = [
        {"event_id": 0, "window_size": 64, "data": {"type": "created", "num_blocks_per_cache_level": [8]}},
        {
            "event_id": 1,
            "window_size": 64,
            "hash_algo": "v2_sha256",
            "layer_group_id": 0,
            "data": {"type": "stored", "parent_hash": None, "blocks": blocks},
        },
    ]
    index = Index()
    index.apply(EventTranslator(SIZE, ChainSeeds(SIZE)).translate(events))
    assert list(index.blocks) == block_hashes(list(range(2 * SIZE)), SIZE, chain_seed("tenant")).tolist()


@pytest.mark.parametrize(
    "broken",
    [
        {"window_size": 4096, "data": {"type": "removed", "block_hashes": []}},
        {"event_id": 2, "window_size": 4096, "data": {"type": "removed"}},
        {"event_id": 2, "window_size": 4096, "data": None},
        {
            "event_id": 2,
            "window_size": 4096,
            "data": {"type": "stored", "parent_hash": None, "blocks": [{"tokens": [1]}]},
        },
    ],
)
def test_an_event_that_cannot_be_read_voids_what_was_known(broken: Any) -> None:
    cache, index = RadixCache(SIZE), Index()
    cache.store(list(range(SIZE)))
    translator = EventTranslator(SIZE, ChainSeeds(SIZE))
    index.apply(translator.translate([*cache.events, broken]))
    assert index.blocks == {}
    assert translator.counts.malformed == 1


def test_events_of_kinds_to_come_are_passed_over() -> None:
    cache, index = RadixCache(SIZE), Index()
    cache.store(list(range(SIZE)))
    cache.tell({"type": "compressed"})
    cache.store([7] * SIZE)
    index.apply(EventTranslator(SIZE, ChainSeeds(SIZE)).translate(cache.events))
    assert index.blocks == cache.truth()


def test_the_model_names_blocks_as_the_engine_does() -> None:
    cache = RadixCache(SIZE)
    cache.store([1, 2, 3, 4, 5, 6, 7, 8])
    assert list(cache.nodes) == [924206229973855, block_key([5, 6, 7, 8], 924206229973855)]
