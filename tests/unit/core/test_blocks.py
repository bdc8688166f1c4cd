"""Chained block hashes: equal for equal prefixes, however they are computed, and for nothing else."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.core.blocks import ROOT, _coefficients, block_hashes, chain_seed

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


def test_coefficients_allow_no_collision_by_one_token_or_by_an_exchange() -> None:
    numbers = _coefficients(1024)
    assert (numbers & np.uint64(1)).all()
    low = np.sort(numbers & np.uint64(2**32 - 1))
    assert (np.diff(low) > 0).all()
    assert numbers[:16].tolist() == _coefficients(16).tolist()


@given(st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=64), st.data())
def test_an_exchange_of_two_tokens_counts(token_ids: list[int], data: st.DataObject) -> None:
    one, other = (data.draw(st.integers(0, len(token_ids) - 1)) for _ in range(2))
    turned = list(token_ids)
    turned[one], turned[other] = turned[other], turned[one]
    equal = block_hashes(token_ids, len(token_ids)).tolist() == block_hashes(turned, len(token_ids)).tolist()
    assert equal == (turned == token_ids)


def low_entropy(rng: np.random.Generator) -> npt.NDArray[np.uint32]:
    """Blocks of few different tokens, far apart and with many trailing zeros."""
    return rng.choice(np.array([0, 1, 2**16, 2**31], dtype=np.uint32), size=(200_000, 32))


def counters(rng: np.random.Generator) -> npt.NDArray[np.uint32]:
    """Blocks that are alike but for two tokens, which count."""
    blocks = np.tile(rng.integers(0, 128_000, 32, dtype=np.uint32), (200_000, 1))
    blocks[:, 3], blocks[:, 20] = np.divmod(np.arange(200_000, dtype=np.uint32), np.uint32(500))
    return blocks


def equal_sums(rng: np.random.Generator) -> npt.NDArray[np.uint32]:
    """Orders of the same tokens."""
    return rng.permuted(np.tile(np.arange(0, 32, dtype=np.uint32), (200_000, 1)), axis=1)


def shifted(rng: np.random.Generator) -> npt.NDArray[np.uint32]:
    """Arithmetic sequences: each block is another one plus a constant."""
    starts = np.arange(200_000, dtype=np.uint32)
    return np.asarray(starts[:, None] + np.arange(0, 3200, 100, dtype=np.uint32), dtype=np.uint32)


@pytest.mark.parametrize("make", [low_entropy, counters, equal_sums, shifted])
def test_structured_blocks_do_not_collide(make: Callable[[np.random.Generator], npt.NDArray[np.uint32]]) -> None:
    blocks = np.unique(make(np.random.default_rng(0)), axis=0)
    chained = block_hashes(blocks.reshape(-1), 32)  # all of them as one prompt: no prefix may equal another
    assert len(np.unique(chained)) == len(blocks)
    size = 1000  # each of them after the same parent
    alone = [block_hashes(block, 32, parent=7) for block in blocks[:size]]
    assert len(np.unique(np.concatenate(alone))) == size


def test_moving_a_difference_to_another_block_counts() -> None:
    # A chain that were linear in the tokens would give pairs of blocks the same hash for many such moves.
    pairs = np.zeros((300, 300, 4), dtype=np.uint32)
    pairs[:, :, 1], pairs[:, :, 3] = np.indices((300, 300))
    hashes = [block_hashes(row.reshape(-1), 2)[1::2] for row in pairs.transpose(1, 0, 2)]
    firsts = [block_hashes(pair, 2)[1] for pair in pairs.reshape(-1, 4)[::9]]
    assert len(np.unique(np.concatenate(hashes))) == 300 * 300
    assert len(set(firsts)) == len(firsts)


def test_bits_are_evenly_used() -> None:
    hashes = block_hashes(np.arange(2 * 40_000, dtype=np.uint32), 2)
    for shift in range(0, 64, 8):
        counts = np.bincount(((hashes >> np.uint64(shift)) & np.uint64(255)).astype(np.int64), minlength=256)
        chi_square = float(((counts - counts.mean()) ** 2).sum() / counts.mean())
        assert chi_square < 370  # 255 degrees of freedom: exceeded by one even distribution in 300,000


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
    expected = [0x124F7A85DDED4C9D, 0xB8E64D23401DD862, 0xFA59183C96FF0FDB]
    assert block_hashes([1, 2, 3, 4, 5, 6], 2).tolist() == expected


@pytest.mark.parametrize("count", [0, 1, 31])
def test_a_partial_block_has_none(count: int) -> None:
    assert len(block_hashes([7] * count, 32)) == 0
