"""ChainSeeds: a chain is published under its own salt, or not at all."""

import hashlib

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.core.blocks import ROOT, chain_seed
from serve.engines.trtllm.block_key import block_key, salt_id_of
from serve.engines.trtllm.chain_seeds import LINGER_S, ChainSeeds, private_salt

SIZE = 4
HEAD = (1, 2, 3, 4)


def digest(data: bytes) -> bytes:
    """Stands for BLAKE3, which is an optional dependency."""
    return hashlib.blake2b(data, digest_size=32).digest()


def key_of(tokens: tuple[int, ...], salt: str = "") -> int:
    return block_key(tokens, salt_id=salt_id_of(digest(salt.encode())) if salt else None)


def packed(tokens: tuple[int, ...]) -> npt.NDArray[np.uint32]:
    return np.array(tokens, dtype=np.uint32)


def seed(seeds: ChainSeeds, tokens: tuple[int, ...], key: int | str, v1: bool = True) -> int | None:
    return seeds.seed(tokens, key, has_v1_key=v1, salt=None)


def test_without_salts_every_chain_is_plain_whatever_its_hash() -> None:
    seeds = ChainSeeds(SIZE)
    seeds.begin("a", packed(HEAD), "")
    assert seed(seeds, HEAD, 123) == ROOT
    assert seed(seeds, HEAD, "5af1", v1=False) == ROOT


@pytest.mark.parametrize("with_digest", [True, False])
def test_a_salted_chain_is_told_from_a_plain_one_with_the_same_tokens(with_digest: bool) -> None:
    seeds = ChainSeeds(SIZE, digest if with_digest else None)
    seeds.begin("plain", packed((*HEAD, 9)), "")
    seeds.begin("salted", packed((*HEAD, 9)), "tenant")
    assert seed(seeds, HEAD, key_of(HEAD)) == ROOT
    assert seed(seeds, HEAD, key_of(HEAD, "tenant")) == chain_seed("tenant")


def test_two_salts_with_the_same_tokens_need_the_digest() -> None:
    for with_digest in (True, False):
        seeds = ChainSeeds(SIZE, digest if with_digest else None)
        for salt in ("a", "b"):
            seeds.begin(salt, packed((*HEAD, 9)), salt)
        for salt in ("a", "b"):
            expected = chain_seed(salt) if with_digest else None
            assert seed(seeds, HEAD, key_of(HEAD, salt)) == expected


def test_a_salted_chain_that_nobody_asked_for_is_not_published() -> None:
    seeds = ChainSeeds(SIZE, digest)
    seeds.begin("a", packed((7, 7, 7, 7)), "tenant")
    assert seed(seeds, HEAD, key_of(HEAD, "tenant")) is None


def test_a_hash_that_cannot_be_computed_leaves_who_was_in_flight() -> None:
    seeds = ChainSeeds(SIZE)
    seeds.begin("a", packed((*HEAD, 9)), "tenant")
    assert seed(seeds, HEAD, "5af1", v1=False) == chain_seed("tenant")
    seeds.begin("b", packed((*HEAD, 9)), "")
    assert seed(seeds, HEAD, "5af1", v1=False) is None


def test_a_prompt_shorter_than_a_block_counts() -> None:
    seeds = ChainSeeds(SIZE)
    seeds.begin("a", packed((1, 2)), "tenant")
    assert seed(seeds, HEAD, "5af1", v1=False) == chain_seed("tenant")
    assert seed(seeds, (2, 2, 3, 4), "5af1", v1=False) is None


def test_what_the_event_says_counts_first() -> None:
    seeds = ChainSeeds(SIZE)
    seeds.begin("a", packed(HEAD), "other")
    assert seeds.seed(HEAD, 1, has_v1_key=True, salt="tenant") == chain_seed("tenant")
    assert seeds.seed(HEAD, 1, has_v1_key=True, salt="") == ROOT


def test_private_chains_are_not_published() -> None:
    seeds = ChainSeeds(SIZE, digest)
    salt = private_salt()
    assert private_salt() != salt
    seeds.begin("a", packed((*HEAD, 9)), salt)
    assert seed(seeds, HEAD, key_of(HEAD, salt)) is None
    assert seeds.seed(HEAD, 1, has_v1_key=True, salt=salt) is None
    assert seed(seeds, HEAD, key_of(HEAD)) == ROOT


def test_requests_are_remembered_for_a_while_after_their_end() -> None:
    seeds = ChainSeeds(SIZE)
    seeds.begin("a", packed(HEAD), "tenant")
    seeds.end("a", 100.0)
    seeds.end("a", 100.0)
    seeds.end("unknown", 100.0 + LINGER_S)
    assert seed(seeds, HEAD, "5af1", v1=False) == chain_seed("tenant")
    seeds.end("unknown", 101.0 + LINGER_S)
    assert seed(seeds, HEAD, "5af1", v1=False) is None


requests = st.lists(
    st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=6).map(tuple), st.sampled_from(["", "a", "b"])),
    min_size=1,
    max_size=8,
)


@given(asked=requests, with_digest=st.booleans(), v1=st.booleans(), data=st.data())
def test_never_a_seed_that_is_not_the_chains_own(
    asked: list[tuple[tuple[int, ...], str]], with_digest: bool, v1: bool, data: st.DataObject
) -> None:
    seeds = ChainSeeds(SIZE, digest if with_digest else None)
    for i, (prompt, salt) in enumerate(asked):
        seeds.begin(str(i), packed(prompt), salt)
    prompt, salt = data.draw(st.sampled_from(asked))
    tokens = (*prompt, *data.draw(st.tuples(*[st.integers(0, 1)] * SIZE)))[:SIZE]
    found = seed(seeds, tokens, key_of(tokens, salt) if v1 else f"{tokens}{salt}", v1)
    assert found in (chain_seed(salt) if salt else ROOT, None)
    if v1 and (with_digest or not salt):
        assert found is not None
