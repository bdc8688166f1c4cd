"""BlockTable against a dictionary."""

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from serve.core.block_table import BlockTable, Hashes

# Many of these share a bucket; one is 0, one the highest there is.
UNIVERSE = [low + (high << 50) for high in range(60) for low in range(5)] + [2**64 - 1]


def array(hashes: list[int]) -> Hashes:
    return np.array(hashes, dtype=np.uint64)


@given(seed=st.integers(0, 2**32), steps=st.integers(1, 40))
def test_every_hash_keeps_its_slot_until_it_is_discarded(seed: int, steps: int) -> None:
    rng = random.Random(seed)
    table = BlockTable(len(UNIVERSE))
    slots: dict[int, int] = {}
    for _ in range(steps):
        some = rng.sample(UNIVERSE, rng.choice([1, 3, 30, 200]))
        match rng.randrange(4):
            case 0:
                found = table.enter(array(some)).tolist()
            case 1:
                found = table.enter_few([*some, some[0]])[: len(some)]
            case 2:
                found = [table.enter_one(one) for one in some]
            case _:
                found = []
                for one in some:
                    if one in slots:
                        table.discard(slots.pop(one))
        for one, slot in zip(some, found, strict=False):
            assert slots.setdefault(one, slot) == slot
        assert table.count == len(slots)
        assert len(set(slots.values())) == len(slots)
        assert all(1 <= slot <= table.top <= len(UNIVERSE) for slot in slots.values())
        expected = [slots.get(one, 0) for one in UNIVERSE]
        assert table.find(array(UNIVERSE)).tolist() == expected
        asked = rng.sample(UNIVERSE, 100)
        leading = [slots.get(one, 0) for one in asked]
        assert [table.find_one(one) for one in asked[:5]] == leading[:5]
        assert table.find_leading(array(asked)).tolist() == leading[: [*leading, 0].index(0)]


def test_growing_keeps_every_slot() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 600_000, dtype=np.uint64)
    table = BlockTable(1_000_000)
    slots = table.enter(hashes[:100])
    for slot in slots[:50].tolist():
        table.discard(slot)
    for start in range(100, len(hashes), 50_000):  # past both sizes at which it moves
        table.enter(hashes[start : start + 50_000])
    assert table.count == len(hashes) - 50
    assert not table.find(hashes[:50]).any()
    assert table.find(hashes[50:100]).tolist() == slots[50:].tolist()
    assert len(np.unique(table.find(hashes[50:]))) == len(hashes) - 50


def test_slots_are_used_again() -> None:
    table = BlockTable(10)
    for number in range(100):
        slots = table.enter_few(list(range(10 * number, 10 * number + 10)))
        for slot in slots:
            table.discard(slot)
    assert table.top == 10
    assert table.count == 0
