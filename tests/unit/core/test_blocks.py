"""Chained block hashes: equal for equal prefixes, however they are computed, and for nothing else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.core.blocks import ROOT, block_hashes, chain_seed

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=80)
sizes = st.integers(1, 17)
parents = st.integers(0, 2**64 - 1)


@given(token_ids=tokens, size=sizes, parent=parents)
def test_every_full_block_has_a_hash(token_ids: list[int], size: int, parent: int) -> None:
    hashes = block_hashes(token_ids, size, parent)
    assert hashes.dtype == np.uint64
    assert hashes.shape == (len(token_ids) // size,)
    assert len(set(hashes.tolist())) == len(hashes)


@given(token_ids=tokens, size=sizes, parent=parents, cut=st.integers(0, 80))
def test_piece_by_piece_is_the_same_as_at_once(token_ids: list[int], size: int, parent: int, cut: int) -> None:
    whole = block_hashes(token_ids, size, parent).tolist()
    first = token_ids[: min(cut, len(whole)) * size]
    head = block_hashes(first, size, parent).tolist()
    tail = block_hashes(token_ids[len(first) :], size, head[-1] if head else parent).tolist()
    assert head + tail == whole


@given(token_ids=tokens, size=sizes)
def test_lists_and_arrays_are_the_same(token_ids: list[int], size: int) -> None:
    array = np.asarray(token_ids, dtype=np.uint32)
    assert block_hashes(array, size).tolist() == block_hashes(token_ids, size).tolist()


@given(token_ids=tokens, more=tokens, size=sizes)
def test_a_prefix_has_the_hashes_of_its_blocks(token_ids: list[int], more: list[int], size: int) -> None:
    prefix = block_hashes(token_ids, size).tolist()
    assert block_hashes(token_ids + more, size).tolist()[: len(prefix)] == prefix


@given(token_ids=tokens.filter(bool), size=sizes, at=st.integers(0, 79), other=st.integers(0, 2**32 - 1))
def test_a_changed_token_changes_its_block_and_all_after_it(
    token_ids: list[int], size: int, at: int, other: int
) -> None:
    at %= len(token_ids)
    changed = [*token_ids[:at], other, *token_ids[at + 1 :]]
    if changed == token_ids:
        return
    before, after = block_hashes(token_ids, size).tolist(), block_hashes(changed, size).tolist()
    same = [one == two for one, two in zip(before, after, strict=True)]
    assert same == [block < at // size for block in range(len(before))]


@given(token_ids=st.lists(st.integers(0, 3), min_size=4, max_size=4), size=st.just(4))
def test_order_within_a_block_counts(token_ids: list[int], size: int) -> None:
    turned = token_ids[::-1]
    equal = block_hashes(token_ids, size).tolist() == block_hashes(turned, size).tolist()
    assert equal == (turned == token_ids)


def test_no_collision_among_all_small_blocks() -> None:
    grid = np.indices((40, 40, 40)).reshape(3, -1).T.astype(np.uint32)
    hashes = {int(block_hashes(row, 3)[0]) for row in grid[::7]}
    assert len(hashes) == len(grid[::7])


def test_salt_and_lora_separate_chains() -> None:
    seeds = [chain_seed(), chain_seed("a"), chain_seed("b"), chain_seed("", "a"), chain_seed("a", "a")]
    assert len(set(seeds)) == len(seeds)
    assert seeds[0] == ROOT
    chains = [block_hashes([1, 2, 3, 4], 2, seed).tolist() for seed in seeds]
    assert len({block for chain in chains for block in chain}) == 2 * len(seeds)


def test_hashes_are_the_same_in_every_release() -> None:
    # Gateways and replicas of different releases talk to each other during a rolling update.
    assert ROOT == 0x4882EAD1CDD9F694
    assert chain_seed("salt", "lora") == 0x59AD2A8A3956532B
    expected = [0xF5A07F9CF426F0C3, 0xFF7DCC309BA19A3B, 0xE4CF600DF10B678B]
    assert block_hashes([1, 2, 3, 4, 5, 6], 2).tolist() == expected


@pytest.mark.parametrize("count", [0, 1, 31])
def test_a_partial_block_has_none(count: int) -> None:
    assert len(block_hashes([7] * count, 32)) == 0
