"""Keys and hashes of a growing sequence."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.core.blocks import block_hashes, chain_seed
from serve.core.request import pack_tokens
from serve.engines.transformers.block_chain import BlockChain

SECRET = b"secret"
token_lists = st.lists(st.integers(0, 2**32 - 1), max_size=40)
sizes = st.integers(1, 9)
salts = st.text(max_size=3)


def chain_of(tokens: list[int], size: int, salt: str = "", secret: bytes = SECRET) -> BlockChain:
    return BlockChain(pack_tokens(tokens), size, salt, secret)


def keys_of(chain: BlockChain, size: int) -> list[bytes]:
    return [chain.key(i) for i in range(chain.num_tokens // size)]


@given(token_lists, token_lists, sizes, salts, st.randoms())
def test_a_sequence_that_grows_is_the_same_as_one_that_is_complete(
    prompt: list[int], output: list[int], size: int, salt: str, random: object
) -> None:
    whole, growing = chain_of(prompt + output, size, salt), chain_of(prompt, size, salt)
    for token in output:
        growing.append(token)
        if growing.num_tokens % size == 0:  # asked in between, or only at the end
            assert growing.key(growing.num_tokens // size - 1) == whole.key(growing.num_tokens // size - 1)
    assert growing.token_ids() == prompt + output
    assert keys_of(growing, size) == keys_of(whole, size)
    published = [growing.published(i) for i in range(growing.num_tokens // size)]
    assert published == [whole.published(i) for i in range(whole.num_tokens // size)]


@given(token_lists, sizes, salts)
def test_published_hashes_are_those_of_the_gateway(tokens: list[int], size: int, salt: str) -> None:
    hashes = block_hashes(np.array(tokens, dtype=np.uint32), size, chain_seed(salt)).tolist()
    chain = chain_of(tokens, size, salt)
    parents = [chain_seed(salt), *hashes]
    assert [chain.published(i) for i in range(len(hashes))] == list(zip(hashes, parents, strict=False))


@given(token_lists, token_lists, sizes)
def test_keys_are_equal_exactly_as_far_as_the_tokens_are(one: list[int], other: list[int], size: int) -> None:
    common = 0
    while common < min(len(one), len(other)) and one[common] == other[common]:
        common += 1
    pairs = zip(keys_of(chain_of(one, size), size), keys_of(chain_of(other, size), size), strict=False)
    assert [a == b for a, b in pairs] == [(i + 1) * size <= common for i in range(min(len(one), len(other)) // size)]


@given(st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=20), st.sets(salts, min_size=2, max_size=4))
def test_salts_and_secrets_have_no_key_in_common(tokens: list[int], some_salts: set[str]) -> None:
    chains = [chain_of(tokens, 4, salt) for salt in some_salts]
    chains += [chain_of(tokens, 4, secret=b"other")]
    keys = [key for chain in chains for key in keys_of(chain, 4)]
    assert len(set(keys)) == len(keys)


def test_a_block_that_is_not_full_has_no_key() -> None:
    chain = chain_of([1, 2, 3], 2)
    for ask in (chain.key, chain.published):
        ask(0)
        with pytest.raises(IndexError, match="block 1 is not full"):
            ask(1)
