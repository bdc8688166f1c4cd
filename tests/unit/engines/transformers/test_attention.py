"""Paged attention is plain attention over each sequence, wherever its keys lie."""

import math
import random
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.engines.transformers.attention import PageViews, alike, paged_attention

PAGE, HEADS, KV_HEADS, DIM, NUM_PAGES = 4, 6, 2, 8, 60
SCALING = 0.3


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attend from the last tokens of one sequence: (queries, heads, dim) to (keys, kv_heads, dim)."""
    queries, keys = len(query), len(key)
    output = torch.empty(queries, HEADS, DIM)
    for head in range(HEADS):
        kv_head = head // (HEADS // KV_HEADS)
        for i in range(queries):
            seen = keys - queries + i + 1
            weights = (key[:seen, kv_head] @ query[i, head] * SCALING).softmax(0)
            output[i, head] = weights @ value[:seen, kv_head]
    return output


class Batch:
    """Sequences in a paged cache, of which the last `new` tokens each are to be computed."""

    def __init__(self, sequences: list[tuple[int, int]], seed: int) -> None:
        torch.manual_seed(seed)
        self.new = [min(new, length) for length, new in sequences]
        self.lengths = [length for length, _ in sequences]
        self.keys = [torch.randn(n, KV_HEADS, DIM) for n in self.lengths]
        self.values = [torch.randn(n, KV_HEADS, DIM) for n in self.lengths]
        self.queries = [torch.randn(n, HEADS, DIM) for n in self.new]
        pages = random.Random(seed).sample(range(1, NUM_PAGES), NUM_PAGES - 1)  # page 0 is the trash page
        self.tables = [[pages.pop() for _ in range(math.ceil(n / PAGE))] for n in self.lengths]
        # What no sequence wrote is noise, as in a cache in use; only the trash page is known to be finite.
        self.cache = tuple(torch.randn(NUM_PAGES, PAGE, KV_HEADS, DIM) * 100 for _ in range(2))
        for i, (length, new) in enumerate(zip(self.lengths, self.new, strict=True)):
            for at in range(length - new):
                page, offset = self.tables[i][at // PAGE], at % PAGE
                self.cache[0][page, offset] = self.keys[i][at]
                self.cache[1][page, offset] = self.values[i][at]

    def slots(self, i: int, start: int) -> list[int]:
        return [self.tables[i][at // PAGE] * PAGE + at % PAGE for at in range(start, self.lengths[i])]

    def attend(self, *, block_table: bool, reads_cache: bool) -> torch.Tensor:
        views = PageViews({0: self.cache}, trash_page=0)  # type: ignore[dict-item]  # a pair
        rows = range(len(self.lengths))
        starts = [length - new for length, new in zip(self.lengths, self.new, strict=True)]
        reads = [slot for i in rows for slot in self.slots(i, 0)] if reads_cache else []
        widest = max(len(table) for table in self.tables) + 2
        table = torch.tensor([[table + [-1] * (widest - len(table)) for table in self.tables]], dtype=torch.int32)
        new_keys, new_values = (
            torch.cat([x[i][starts[i] :] for i in rows]).transpose(0, 1).unsqueeze(0) for x in (self.keys, self.values)
        )
        output, weights = paged_attention(
            SimpleNamespace(layer_idx=0),
            torch.cat(self.queries).transpose(0, 1).unsqueeze(0),
            new_keys,
            new_values,
            None,
            SCALING,
            cache=SimpleNamespace(raytrt_views=views),
            cu_seq_lens_q=torch.tensor([0, *accumulate(self.new)]),
            cu_seq_lens_k={"full_attention": torch.tensor([0, *accumulate(self.lengths)])},
            read_index=[torch.tensor(reads, dtype=torch.long)],
            write_index=[torch.tensor([slot for i in rows for slot in self.slots(i, starts[i])])],
            block_table=table if block_table else None,
        )
        assert weights is None
        return output[0]

    def check(self, output: torch.Tensor) -> None:
        expected = [reference(*row) for row in zip(self.queries, self.keys, self.values, strict=True)]
        torch.testing.assert_close(output, torch.cat(expected), atol=1e-5, rtol=1e-5)
        for i, length in enumerate(self.lengths):  # and what is new was written where it belongs
            for at in range(length):
                page, offset = self.tables[i][at // PAGE], at % PAGE
                torch.testing.assert_close(self.cache[0][page, offset], self.keys[i][at])
                torch.testing.assert_close(self.cache[1][page, offset], self.values[i][at])


lengths = st.integers(1, 30)


@settings(max_examples=30)
@given(st.lists(lengths, min_size=1, max_size=7), st.integers(0, 100))
def test_decoding_through_the_block_table(sequences: list[int], seed: int) -> None:
    batch = Batch([(length, 1) for length in sequences], seed)
    batch.check(batch.attend(block_table=True, reads_cache=False))


@settings(max_examples=30)
@given(st.lists(st.tuples(lengths, st.integers(1, 12)), min_size=1, max_size=7), st.integers(0, 100))
def test_chunks_of_prompts_among_sequences_that_decode(sequences: list[tuple[int, int]], seed: int) -> None:
    batch = Batch(sequences, seed)
    batch.check(batch.attend(block_table=False, reads_cache=True))


@settings(max_examples=15)
@given(st.lists(lengths, min_size=1, max_size=4), st.integers(0, 100))
def test_whole_prompts_do_not_read_the_cache(sequences: list[int], seed: int) -> None:
    batch = Batch([(length, length) for length in sequences], seed)
    batch.check(batch.attend(block_table=False, reads_cache=False))


@pytest.mark.parametrize(("keys", "queries"), [(1, 1), (9, 9), (9, 4), (9, 1)])
def test_without_a_paged_cache_it_is_causal_attention(keys: int, queries: int) -> None:
    batch = Batch([(keys, queries)], 0)
    query, key, value = (x[0].transpose(0, 1).unsqueeze(0) for x in (batch.queries, batch.keys, batch.values))
    output, _ = paged_attention(SimpleNamespace(layer_idx=0), query, key, value, None, SCALING)
    torch.testing.assert_close(output[0], reference(batch.queries[0], batch.keys[0], batch.values[0]))


def test_zeroing_spares_the_blocks_that_are_held() -> None:
    keys, values = torch.ones(8, PAGE, KV_HEADS, DIM), torch.full((8, PAGE, KV_HEADS, DIM), torch.nan)
    PageViews({0: (keys, values)}, trash_page=0, pages_per_block=2).zero_all_but({1, 3})
    assert keys[:, 0, 0, 0].tolist() == [0, 1, 1, 1, 0, 1, 1, 1]  # of each pair of pages one is this layer's
    assert values[:, 0, 0, 0].isnan().tolist() == [False, True, True, True, False, True, True, True]


@given(st.lists(st.integers(1, 5000), max_size=60), st.integers(1, 200), st.integers(1, 10_000))
def test_groups_hold_every_sequence_once_and_waste_little(lengths: list[int], slack: int, limit: int) -> None:
    groups = alike(lengths, slack_tokens=slack, group_tokens=limit)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        sizes = [lengths[i] for i in group]
        assert max(sizes) <= 2 * min(sizes) + slack
        assert len(group) == 1 or max(sizes) * len(group) <= limit
