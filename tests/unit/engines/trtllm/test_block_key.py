"""The v1 block key of TensorRT-LLM 1.2.x, against the vectors of its description and a second implementation."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from serve.engines.trtllm.block_key import block_key, block_keys, salt_id_of

tokens = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=12)
keys = st.integers(0, 2**64 - 1)
M32, M64 = 2**32 - 1, 2**64 - 1


def plain_key(token_ids: list[int], parent: int, salt_id: int | None, lora_id: int | None) -> int:
    """The description, step by step on Python's integers."""

    def mix64(value: int, seed: int) -> int:
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & M64
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & M64
        value = value ^ (value >> 31)
        return seed ^ ((value + 0x9E3779B9 + (seed << 6) + (seed >> 2)) & M64)

    seed = len(token_ids) ^ ((parent * 0xBF58476D1CE4E5B9) & M64)
    if parent == 0 and salt_id is not None:
        seed = mix64(salt_id, seed)
    for token in token_ids:
        value = token
        for _ in range(2):
            value = (((value >> 16) ^ value) * 0x45D9F3B) & M32
        value = (value >> 16) ^ value
        value = (value + 0x9E3779B9) & M32
        seed ^= (value + (seed << 6) + (seed >> 2)) & M64
    return seed if lora_id is None else mix64(lora_id, seed)


def test_the_published_vectors() -> None:
    assert block_key([1, 2, 3, 4]) == 924206229973855
    assert block_key([5, 6, 7, 8], parent=924206229973855) == 2728178455351807326


@given(token_ids=tokens, parent=st.one_of(st.just(0), keys), salt_id=st.none() | keys, lora_id=st.none() | keys)
def test_it_is_the_description(token_ids: list[int], parent: int, salt_id: int | None, lora_id: int | None) -> None:
    expected = plain_key(token_ids, parent, salt_id, lora_id)
    assert block_key(token_ids, parent, salt_id, lora_id) == expected
    assert block_key(np.array(token_ids, dtype=np.uint32), parent, salt_id, lora_id) == expected


@given(token_ids=tokens, size=st.integers(1, 5))
def test_a_sequence_is_cut_without_its_last_token(token_ids: list[int], size: int) -> None:
    usable = token_ids[:-1]
    blocks = [usable[i : i + size] for i in range(0, len(usable), size)]
    parent, expected = 0, []
    for block in blocks:
        parent = block_key(block, parent)
        expected.append(parent)
    assert block_keys(token_ids, size) == expected


@given(token_ids=tokens, parent=st.integers(1, 2**64 - 1), salt_id=keys)
def test_a_salt_counts_for_the_first_block_only(token_ids: list[int], parent: int, salt_id: int) -> None:
    assert block_key(token_ids, parent, salt_id) == block_key(token_ids, parent)


def test_a_salt_id_is_the_digests_beginning() -> None:
    assert salt_id_of(bytes(range(1, 33))) == 0x0807060504030201
