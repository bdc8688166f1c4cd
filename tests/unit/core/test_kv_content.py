"""KvContent against a dictionary."""

import sys
from array import array

from hypothesis import given
from hypothesis import strategies as st

from serve.core.kv_content import KvContent, PackedContent
from serve.core.kv_events import GPU, KvEvent, KvRemoved, KvSnapshot, KvStored

words = st.integers(0, 12) | st.just((1 << 64) - 1)
tiers = st.integers(0, 2)
chains = st.lists(words, max_size=5, unique=True).map(tuple)
snapshots = st.lists(st.tuples(words, words, tiers), max_size=8, unique_by=lambda block: block[0]).flatmap(
    lambda blocks: st.sampled_from(
        [
            KvSnapshot(*(tuple(block[i] for block in blocks) for i in range(3))),
            KvSnapshot(*(tuple(block[i] for block in blocks) for i in range(2))),
        ]
    )
)
events: st.SearchStrategy[list[KvEvent]] = st.lists(
    st.builds(KvStored, chains, words, tiers) | st.builds(KvRemoved, chains) | snapshots, max_size=12
)


def apply(naive: dict[int, tuple[int, int]], event: KvEvent) -> None:
    if isinstance(event, KvSnapshot):
        naive.clear()
        in_tiers = event.tiers or (GPU,) * len(event.block_hashes)
        naive.update(
            {block: rest for block, *rest in zip(event.block_hashes, event.parents, in_tiers, strict=True)}  # type: ignore[misc]
        )
    elif isinstance(event, KvStored):
        for block, parent in zip(event.block_hashes, (event.parent, *event.block_hashes), strict=False):
            naive[block] = (parent, event.tier)
    else:
        for block in event.block_hashes:
            naive.pop(block, None)


def unpacked(packed: PackedContent) -> dict[int, tuple[int, int]]:
    hashes, parents = array("Q", packed.hashes), array("Q", packed.parents)
    in_tiers = packed.tiers or bytes(len(hashes))
    assert len(packed) == len(hashes)
    return {block: (parent, tier) for block, parent, tier in zip(hashes, parents, in_tiers, strict=True)}


@given(history=events)
def test_holds_what_the_events_add_up_to(history: list[KvEvent]) -> None:
    content, naive = KvContent(), dict[int, tuple[int, int]]()
    for event in history:
        content.apply(event)
        apply(naive, event)
        packed = content.pack()
        assert unpacked(packed) == {block: tuple(rest) for block, rest in naive.items()}
        assert len(content) == len(naive)
        assert all(block in content for block in naive)
        assert bool(packed.tiers) == any(tier != GPU for _, tier in naive.values())


def test_a_copy_does_not_change_with_the_content() -> None:
    content = KvContent()
    content.apply(KvStored((1, 2, 3), 0))
    packed = content.pack()
    content.apply(KvRemoved((2,)))
    assert unpacked(packed) == {1: (0, 0), 2: (1, 0), 3: (2, 0)}


def test_integers_on_the_wire_are_little_endian() -> None:
    assert sys.byteorder == "little"  # as on every machine that TensorRT-LLM runs on; else `pack` has to swap
