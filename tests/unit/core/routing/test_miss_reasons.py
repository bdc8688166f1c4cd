"""MissHistory: every missing block has one reason, and the right one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.core.blocks import ROOT, block_hashes, chain_seed
from serve.core.kv_events import KvRemoved, KvSnapshot, KvStored
from serve.core.routing.miss_reasons import MissHistory, MissReason, MissSpan, PromptBlocks

SIZE = 4


def blocks(*numbers: int, salt: str = "", lora: str = "") -> PromptBlocks:
    """Make a prompt whose i-th block consists of the i-th number."""
    tokens = np.repeat(np.array(numbers, dtype=np.uint32), SIZE)
    hashes = block_hashes(tokens, SIZE, chain_seed(salt, lora)).tolist()
    return PromptBlocks(hashes, block_hashes(tokens, SIZE).tolist() if salt or lora else (), salt, lora)


def stored(prompt: PromptBlocks) -> KvStored:
    return KvStored(tuple(int(block) for block in prompt.hashes), chain_seed(prompt.cache_salt, prompt.lora))


def test_a_prompt_that_is_held_misses_nothing() -> None:
    assert MissHistory().explain(blocks(1, 2, 3), 3, 3) == ()


def test_a_new_prompt_was_never_seen() -> None:
    assert MissHistory().explain(blocks(1, 2, 3), 0, 0) == (MissSpan(MissReason.NEVER_SEEN, 0, 3),)


def test_what_another_replica_holds_was_lost_to_the_load() -> None:
    history = MissHistory()
    history.apply(stored(blocks(1, 2, 3)))
    assert history.explain(blocks(1, 2, 3, 4), 1, 3) == (
        MissSpan(MissReason.REPLICA_BUSY, 1, 2),
        MissSpan(MissReason.NEVER_SEEN, 3, 1),
    )


def test_what_was_stored_and_nobody_holds_was_evicted() -> None:
    history = MissHistory()
    history.apply(stored(blocks(1, 2, 3)))
    history.apply(KvRemoved(tuple(int(block) for block in blocks(1, 2, 3).hashes[1:])))
    assert history.explain(blocks(1, 2, 3), 1, 1) == (MissSpan(MissReason.EVICTED, 1, 2),)


def test_a_conversation_that_grew_did_not_diverge() -> None:
    history = MissHistory()
    history.apply(stored(blocks(1, 2)))
    assert history.explain(blocks(1, 2, 3, 4), 2, 2) == (MissSpan(MissReason.NEVER_SEEN, 2, 2),)


def test_a_prompt_diverges_where_another_went_on_differently() -> None:
    history = MissHistory()
    history.apply(stored(blocks(1, 2, 3, 4)))
    assert history.explain(blocks(1, 2, 8, 9), 2, 2) == (MissSpan(MissReason.DIVERGED, 2, 2),)


def test_a_snapshot_tells_of_chains_too() -> None:
    history = MissHistory()
    hashes = tuple(int(block) for block in blocks(1, 2, 3).hashes)
    history.apply(KvSnapshot(hashes, (ROOT, *hashes[:-1])))
    assert history.explain(blocks(1, 7, 8), 1, 1) == (MissSpan(MissReason.DIVERGED, 1, 2),)
    assert history.explain(blocks(1, 2, 3), 0, 0) == (MissSpan(MissReason.EVICTED, 0, 3),)


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ({}, {"salt": "a"}, MissReason.SALT_DIFFERS),
        ({"salt": "a"}, {}, MissReason.SALT_DIFFERS),
        ({"salt": "a"}, {"salt": "b"}, MissReason.SALT_DIFFERS),
        ({"salt": "a", "lora": "x"}, {"salt": "b", "lora": "x"}, MissReason.SALT_DIFFERS),
        ({}, {"lora": "x"}, MissReason.LORA_DIFFERS),
        ({"lora": "x"}, {}, MissReason.LORA_DIFFERS),
        ({"lora": "x"}, {"lora": "y"}, MissReason.LORA_DIFFERS),
        ({"lora": "x", "salt": "a"}, {"lora": "y", "salt": "b"}, MissReason.LORA_DIFFERS),
    ],
)
def test_the_same_tokens_under_another_seed(first: dict[str, str], second: dict[str, str], reason: MissReason) -> None:
    history = MissHistory()
    before = blocks(1, 2, 3, **first)
    history.sent(before)
    history.apply(stored(before))
    assert history.explain(blocks(1, 2, 4, **second), 0, 0) == (
        MissSpan(reason, 0, 2),
        MissSpan(MissReason.NEVER_SEEN, 2, 1),
    )


def test_a_prompt_on_its_way_is_no_reason_for_its_twin() -> None:
    history = MissHistory()
    history.sent(blocks(1, 2, salt="a"))
    assert history.explain(blocks(1, 2, salt="a"), 0, 0) == (MissSpan(MissReason.NEVER_SEEN, 0, 2),)


def test_tables_stay_as_they_are_and_forget() -> None:
    history = MissHistory(stored_slots=1024, content_slots=256)
    for number in range(2000):
        prompt = blocks(number, number + 1, salt="s" if number % 2 else "")
        history.sent(prompt)
        history.apply(stored(prompt))
    assert [span.reason for span in history.explain(blocks(1999, 2000, salt="s"), 0, 0)] == [MissReason.EVICTED]
    assert [span.reason for span in history.explain(blocks(0, 1), 0, 0)] == [MissReason.NEVER_SEEN]


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=6)
seeds = st.sampled_from(["", "a", "b"])


@given(
    past=st.lists(st.tuples(prompts, seeds, seeds), max_size=8),
    now=st.tuples(prompts, seeds, seeds),
    data=st.data(),
)
def test_every_missing_block_has_exactly_one_reason(
    past: list[tuple[list[int], str, str]], now: tuple[list[int], str, str], data: st.DataObject
) -> None:
    history = MissHistory(stored_slots=1 << 23, content_slots=1 << 20)  # no two blocks share a slot
    for numbers, salt, lora in past:
        prompt = blocks(*numbers, salt=salt, lora=lora)
        history.sent(prompt)
        history.apply(stored(prompt))
    numbers, salt, lora = now
    prompt = blocks(*numbers, salt=salt, lora=lora)
    best = data.draw(st.integers(0, len(numbers)))
    hit = data.draw(st.integers(0, best))
    spans = history.explain(prompt, hit, best)
    covered = [span.first_block + number for span in spans for number in range(span.num_blocks)]
    assert covered == list(range(hit, len(numbers)))
    assert all(span.num_blocks > 0 for span in spans)
    # Against the whole past, remembered without bounds.
    seen = {tuple(other[: k + 1]) for other, *seed in past if seed == [salt, lora] for k in range(len(other))}
    depth = sum(tuple(numbers[: k + 1]) in seen for k in range(len(numbers)))
    evicted = sum(span.num_blocks for span in spans if span.reason is MissReason.EVICTED)
    assert evicted == max(0, depth - best)
    if {span.reason for span in spans} & {MissReason.SALT_DIFFERS, MissReason.LORA_DIFFERS}:
        assert any(other[:1] == numbers[:1] and seed != [salt, lora] for other, *seed in past)
