"""Attention over a paged KV cache with PyTorch's own kernels, for CPUs and for GPUs without flash-attn.

The library's `sdpa` packs the whole batch into one sequence under a dense mask: n sequences of length k cost n * n * k
instead of n * k, and the mask alone is `max_num_tokens` times the size of the cache. Here, sequences that decode are
computed together, padded to the longest of those of like length, and each prompt chunk is computed by itself.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "raytrt_paged"

# Gathered keys of one call. On a CPU they should still be in its cache when they are read; a GPU wants large calls.
_GROUP_BYTES = {"cpu": 1 << 20, "cuda": 256 << 20}


@dataclass(frozen=True)
class _Chunk:
    """One sequence of which several tokens are computed: prefill.

    Attributes:
        start, stop: Its queries.
        slots: Cache slots of all its keys; None if its keys are its queries' own.
        mask: (queries, keys), additive; None if queries are all there is, so that plain causal attention will do.
    """

    start: int
    stop: int
    slots: torch.Tensor | None
    mask: torch.Tensor | None


@dataclass(frozen=True)
class _Decodes:
    """Sequences of like length of which one token each is computed.

    Attributes:
        rows: Their queries, (n,).
        units: What to read for each, padded with the trash unit: pages or slots, (n * units_each,).
        keys: Padded length.
        mask: (n, 1, 1, keys), additive; None if there is no padding.
    """

    rows: torch.Tensor
    units: torch.Tensor
    keys: int
    mask: torch.Tensor | None


@dataclass(frozen=True)
class _Plan:
    """How to compute one step; made in its first layer, used in all."""

    marker: torch.Tensor
    write_slots: torch.Tensor
    pages: bool
    decodes: tuple[_Decodes, ...]
    chunks: tuple[_Chunk, ...]


class PageViews:
    """A paged cache as tensors, and the plan of the step in progress. One for each cache.

    Args:
        layers: For each layer its keys and its values, each (num_pages, tokens_per_page, kv_heads, head_dim).
        trash_page: A page of finite numbers that belongs to no sequence.
        pages_per_block: Distance of the pages of two neighbouring blocks.
    """

    def __init__(
        self, layers: dict[int, tuple[torch.Tensor, torch.Tensor]], trash_page: int, pages_per_block: int = 1
    ) -> None:
        self._pages_per_block = pages_per_block
        self.pages = layers
        self.slots = {i: (k.view(-1, *k.shape[2:]), v.view(-1, *v.shape[2:])) for i, (k, v) in layers.items()}
        self.tokens_per_page = next(iter(layers.values()))[0].shape[1]
        self.trash_page = trash_page
        self.plan: _Plan | None = None
        keys = next(iter(layers.values()))[0]
        self._group_tokens = _GROUP_BYTES[keys.device.type] // (keys[0, 0].numel() * keys.element_size())
        self._scratch = [torch.empty(0, dtype=k.dtype, device=k.device) for k in next(iter(layers.values()))]

    def zero_all_but(self, blocks: Set[int]) -> None:
        """Overwrite all blocks but these."""
        for tensors in self.pages.values():
            for pages in tensors:
                kept = torch.tensor(sorted(blocks), dtype=torch.long, device=pages.device) * self._pages_per_block
                free = torch.zeros(len(pages), dtype=torch.bool, device=pages.device)
                free[:: self._pages_per_block] = True
                free[kept] = False
                pages[free] = 0

    def alike(self, lengths: Sequence[int]) -> list[list[int]]:
        """Group sequences that decode, so that little of their gathered keys is padding; indexes of `lengths`."""
        return alike(lengths, slack_tokens=4 * self.tokens_per_page, group_tokens=self._group_tokens)

    def gather(self, layer: int, pages: bool, units: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy keys and values of pages, or of slots, into memory that is used again by the next call.

        Fresh memory of that size would be handed to the process page by page, which costs more than the copy.
        """
        gathered = []
        for which, source in enumerate((self.pages if pages else self.slots)[layer]):
            size = len(units) * source[0].numel()
            if self._scratch[which].numel() < size:
                self._scratch[which] = torch.empty(size * 5 // 4, dtype=source.dtype, device=source.device)
            target = self._scratch[which][:size].view(len(units), *source.shape[1:])
            gathered.append(torch.index_select(source, 0, units, out=target))
        return gathered[0], gathered[1]


def paged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend; the signature is that of the library's `AttentionInterface`.

    Args:
        module: The layer.
        query: (1, heads, num_tokens, head_dim), the tokens of all sequences one after the other.
        key: (1, kv_heads, num_tokens, head_dim); without `cache`, all keys of one sequence.
        value: Likewise.
        attention_mask: Not looked at.
        scaling: Of the scores; None for 1 / sqrt(head_dim).
        cache: The paged cache, with its `PageViews` as `raytrt_views`; None for a plain forward pass.
        **kwargs: What continuous batching passes to every layer.

    Returns:
        (1, num_tokens, heads, head_dim), and no weights.
    """
    if cache is None:
        mask = _causal_mask(query.shape[2], key.shape[2], query)
        return _attend_chunk(query, key, value, mask, scaling).transpose(1, 2), None
    views: PageViews = cache.raytrt_views
    if views.plan is None or views.plan.marker is not kwargs["cu_seq_lens_q"]:
        views.plan = _make_plan(views, query, **kwargs)
    plan = views.plan
    key_slots, value_slots = views.slots[module.layer_idx]
    key_slots.index_copy_(0, plan.write_slots, key[0].transpose(0, 1))
    value_slots.index_copy_(0, plan.write_slots, value[0].transpose(0, 1))
    output = torch.empty(query.shape[2], query.shape[1], value.shape[3], dtype=query.dtype, device=query.device)
    for group in plan.decodes:
        gathered = views.gather(module.layer_idx, plan.pages, group.units)
        output[group.rows] = _attend_decodes(group, query, *gathered, scaling)
    for chunk in plan.chunks:
        span = slice(chunk.start, chunk.stop)
        if chunk.slots is None:
            keys, values = key[:, :, span], value[:, :, span]
        else:
            gathered = views.gather(module.layer_idx, False, chunk.slots)
            keys, values = (units.transpose(0, 1).unsqueeze(0) for units in gathered)
        output[span] = _attend_chunk(query[:, :, span], keys, values, chunk.mask, scaling)[0].transpose(0, 1)
    return output.unsqueeze(0), None


def _attend_chunk(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """Attend from (1, heads, queries, dim) to (1, kv_heads, keys, dim) of one sequence."""
    _, heads, queries, dim = query.shape
    kv_heads = key.shape[1]
    # KV heads as the batch, so that the query heads of each share its keys without a copy.
    grouped = query.reshape(kv_heads, heads // kv_heads, queries, dim)
    keys, values = (x[0].unsqueeze(1).expand(-1, heads // kv_heads, -1, -1) for x in (key, value))
    causal = mask is None and queries > 1
    output = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, is_causal=causal, scale=scaling)
    return output.reshape(1, heads, queries, -1)


def _attend_decodes(
    group: _Decodes, query: torch.Tensor, key_units: torch.Tensor, value_units: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Attend from one query of each sequence of `group` to its gathered keys; (n, heads, dim)."""
    n, (heads, _, dim), kv_heads = len(group.rows), query.shape[1:], key_units.shape[-2]
    # The query heads that share a KV head become queries of that head.
    queries = query[0].transpose(0, 1)[group.rows].reshape(n, kv_heads, heads // kv_heads, dim)
    keys, values = (
        units.view(n, -1, kv_heads, units.shape[-1])[:, : group.keys].transpose(1, 2)
        for units in (key_units, value_units)
    )
    output = scaled_dot_product_attention(queries, keys, values, attn_mask=group.mask, scale=scaling)
    return output.reshape(n, heads, -1)


def _make_plan(
    views: PageViews,
    query: torch.Tensor,
    *,
    cu_seq_lens_q: torch.Tensor,
    cu_seq_lens_k: torch.Tensor | dict[str, torch.Tensor],
    read_index: Sequence[torch.Tensor],
    write_index: Sequence[torch.Tensor],
    block_table: torch.Tensor | None = None,
    **kwargs: Any,
) -> _Plan:
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None or kwargs.get("sliding_window"):
        raise ValueError("this model's attention needs attention: sdpa")
    cu_k = next(iter(cu_seq_lens_k.values())) if isinstance(cu_seq_lens_k, dict) else cu_seq_lens_k
    q_ends, k_ends = cu_seq_lens_q.tolist(), cu_k.tolist()
    lengths = [stop - start for start, stop in pairwise(k_ends)]
    if block_table is not None:
        table = block_table[0].long()
        slots = _last_slots(table, lengths, views.tokens_per_page)
        groups = tuple(_decode_pages(rows, table, lengths, views, query) for rows in views.alike(lengths))
        return _Plan(cu_seq_lens_q, slots, True, groups, ())
    reads = read_index[0]
    spans = list(zip(q_ends, q_ends[1:], k_ends, strict=False))
    chunks = []
    single = []
    for i, (q_start, q_stop, k_start) in enumerate(spans):
        keys = lengths[i]
        if q_stop - q_start == 1 and keys > 1:
            single.append(i)
        elif q_stop > q_start:
            slots_read = reads[k_start : k_start + keys] if reads.numel() else None
            chunks.append(_Chunk(q_start, q_stop, slots_read, _causal_mask(q_stop - q_start, keys, query)))
    groups = tuple(
        _decode_slots([single[j] for j in rows], spans, lengths, reads, views, query)
        for rows in views.alike([lengths[i] for i in single])
    )
    return _Plan(cu_seq_lens_q, write_index[0], False, groups, tuple(chunks))


def alike(lengths: Sequence[int], *, slack_tokens: int, group_tokens: int) -> list[list[int]]:
    """Group sequences of like length; indexes of `lengths`.

    Args:
        lengths: Of the sequences.
        slack_tokens: The longest of a group is at most twice as long as the shortest, and so much longer.
        group_tokens: A group of more than one, padded, is not larger.
    """
    groups: list[list[int]] = []
    shortest = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        too_long = not groups or lengths[i] > 2 * shortest + slack_tokens
        if too_long or lengths[i] * (len(groups[-1]) + 1) > group_tokens:
            groups.append([])
            shortest = lengths[i]
        groups[-1].append(i)
    return groups


def _last_slots(table: torch.Tensor, lengths: Sequence[int], tokens_per_page: int) -> torch.Tensor:
    last = torch.tensor(lengths, device=table.device) - 1
    pages = table.gather(1, (last // tokens_per_page).unsqueeze(1)).squeeze(1)
    return pages * tokens_per_page + last % tokens_per_page


def _decode_pages(
    rows: list[int], table: torch.Tensor, lengths: Sequence[int], views: PageViews, query: torch.Tensor
) -> _Decodes:
    longest = max(lengths[i] for i in rows)
    index = torch.tensor(rows, device=table.device)
    pages = table[index, : -(-longest // views.tokens_per_page)]
    pages = pages.masked_fill(pages < 0, views.trash_page)
    return _Decodes(index, pages.flatten(), longest, _padding_mask([lengths[i] for i in rows], longest, query))


def _decode_slots(
    rows: list[int],
    spans: Sequence[tuple[int, int, int]],
    lengths: Sequence[int],
    reads: torch.Tensor,
    views: PageViews,
    query: torch.Tensor,
) -> _Decodes:
    longest = max(lengths[i] for i in rows)
    slots = reads.new_full((len(rows), longest), views.trash_page * views.tokens_per_page)
    for place, i in enumerate(rows):
        start = spans[i][2]
        slots[place, : lengths[i]] = reads[start : start + lengths[i]]
    index = torch.tensor([spans[i][0] for i in rows], device=reads.device)
    return _Decodes(index, slots.flatten(), longest, _padding_mask([lengths[i] for i in rows], longest, query))


def _padding_mask(lengths: Sequence[int], longest: int, like: torch.Tensor) -> torch.Tensor | None:
    if min(lengths) == longest:
        return None
    valid = torch.arange(longest, device=like.device) < torch.tensor(lengths, device=like.device).unsqueeze(1)
    mask = torch.zeros(len(lengths), longest, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(~valid, -torch.inf)[:, None, None, :]


def _causal_mask(queries: int, keys: int, like: torch.Tensor) -> torch.Tensor | None:
    """Mask of the last `queries` of `keys` tokens; None if plain causal attention is the same, or no mask is needed."""
    if queries in (1, keys):
        return None
    mask = torch.full((queries, keys), -torch.inf, dtype=like.dtype, device=like.device)
    return mask.triu_(keys - queries + 1)
