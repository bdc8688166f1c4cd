"""HolderSets: as many sets as blocks have, and lanes that are another replica's only when nobody has them any more."""

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from serve.core.holder_sets import EMPTY, HolderSets
from serve.core.kv_events import DISK, GPU, HOST


class Blocks:
    """Some blocks, each with the number of its set."""

    def __init__(self) -> None:
        self.sets = HolderSets()
        self.numbers: dict[int, int] = {}
        self.lanes: list[int] = []

    def change(self, block: int, lane: int, tier: int | None) -> None:
        old = self.numbers.get(block, EMPTY)
        new = self.sets.changed(old, lane, tier)
        self.sets.move(old, new, 1)
        self.numbers[block] = new

    def step(self, rng: random.Random) -> None:
        kind = rng.random()
        if not self.lanes or kind < 0.1:
            self.lanes.append(self.sets.open_lane())
        elif kind < 0.2:
            self.sets.retire_lane(self.lanes.pop(rng.randrange(len(self.lanes))))
        elif kind < 0.3:
            self.sets.clean(rng.choice([1, 3, 1000]))
        else:
            self.change(rng.randrange(30), rng.choice(self.lanes), rng.choice([GPU, GPU, HOST, DISK, None]))


@given(seed=st.integers(0, 2**32), steps=st.integers(1, 200))
def test_a_lane_is_opened_only_when_no_block_has_it(seed: int, steps: int) -> None:
    rng = random.Random(seed)
    blocks = Blocks()
    for _ in range(steps):
        before = set(blocks.lanes)
        blocks.step(rng)
        for lane in set(blocks.lanes) - before:
            assert not any(blocks.sets.sets[number].held >> lane & 1 for number in blocks.numbers.values())
        assert blocks.sets.live == sum(1 << lane for lane in blocks.lanes)


@given(seed=st.integers(0, 2**32), steps=st.integers(1, 200))
def test_no_set_outlives_its_blocks(seed: int, steps: int) -> None:
    rng = random.Random(seed)
    blocks = Blocks()
    for _ in range(steps):
        blocks.step(rng)
    used = Counter(number for number in blocks.numbers.values() if number != EMPTY)
    # Besides those, there are the empty one and that of each lane alone.
    assert len(blocks.sets) <= len(used) + 1 + len(blocks.lanes)
    while not blocks.sets.is_clean:
        blocks.sets.clean(1)
    deserted = {number for number in used if not blocks.sets.sets[number].held}
    assert blocks.sets.deserted == deserted
    for lane in blocks.lanes:
        for block in blocks.numbers:
            blocks.change(block, lane, None)
    for number in blocks.numbers.values():
        blocks.sets.move(number, EMPTY, 1)
    assert len(blocks.sets) == 1 + len(blocks.lanes)


def test_lanes_do_not_grow_in_number_with_every_replica_that_comes_and_goes() -> None:
    blocks = Blocks()
    for number in range(2000):
        lane = blocks.sets.open_lane()
        blocks.change(number % 50, lane, GPU)
        blocks.sets.retire_lane(lane)
    assert blocks.sets.num_lanes < 100
