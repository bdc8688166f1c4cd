"""Batcher: the library's continuous batching, driven one step at a time.

This module and `ledger.py` are all that knows the library's private side. Its public manager is not used to run the
batch: it polls ten times a second when idle, copies a sequence's whole output for every token, samples all sequences
with the same parameters, and says neither what was cached nor when a prefill began. Its parts are used instead: the
scheduler, the paged cache, the inputs of each step and the forward pass.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import RequestState

from serve.engines.transformers.attention import NAME as PAGED
from serve.engines.transformers.attention import PageViews
from serve.engines.transformers.block_chain import BlockChain
from serve.engines.transformers.cache_events import CacheEvents
from serve.engines.transformers.ledger import Ledger, open_ledger
from serve.engines.transformers.scoring import PromptForward
from serve.errors import ConfigError

_NO_TOKEN = -1  # the library's way to say that there is no EOS


@dataclass(frozen=True)
class BatchOptions:
    """Sizes of a batch and its cache.

    Attributes:
        num_blocks: KV blocks.
        tokens_per_block: >= 4.
        max_batch_size: Sequences in a step.
        max_num_tokens: Tokens in a step.
        context_tokens: Longest sequence.
        prefix_sharing: Whether equal prefixes share blocks.
    """

    num_blocks: int
    tokens_per_block: int
    max_batch_size: int
    max_num_tokens: int
    context_tokens: int
    prefix_sharing: bool


@dataclass(frozen=True)
class Entry:
    """One sequence as the batcher needs it.

    Attributes:
        name: Unique among the sequences in the batcher.
        chain: Its tokens; the batcher reads them, its owner appends.
        max_tokens: > 0, tokens to generate.
        stop_token_ids: Tokens that end it.
    """

    name: str
    chain: BlockChain
    max_tokens: int
    stop_token_ids: tuple[int, ...]


class Batcher:
    """One model and its paged KV cache. All calls from one thread, which also made it.

    Attributes:
        ledger: Its blocks.
        shares_prefixes: Whether it reuses blocks; never with layers of several kinds of attention.
        events: What the ledger's keys are published as.
        survives_failed_steps: Whether `drop_step` can be called after a step that ran out of memory.

    Args:
        model: On its device, in evaluation mode.
        options: Sizes.
        choose: Called in every step with logits, (n, vocab_size), float32, that it may overwrite, and the names of the
            n sequences; returns a token for each.
        on_match: Called with a sequence's name when its prefill begins, and how many tokens it found in the cache.

    Raises:
        ConfigError: The model or this release of the library does not support it.
        MemoryError: The cache does not fit.
    """

    survives_failed_steps = True

    def __init__(
        self,
        model: Any,
        options: BatchOptions,
        choose: Callable[[torch.Tensor, list[str]], list[int]],
        on_match: Callable[[str, int], None],
    ) -> None:
        self._model = model
        self._options = options
        self._choose = choose
        self._on_match = on_match
        self.events = CacheEvents()
        self._entries: dict[str, Entry] = {}
        self._registered: dict[str, int] = {}
        try:
            self._processor = _make_processor(model, options)
            cache = self._processor.cache
            self.shares_prefixes = bool(cache.use_prefix_sharing)
            self.ledger: Ledger = open_ledger(cache)
            if model.config._attn_implementation == PAGED:
                cache.raytrt_views = _page_views(cache, model.config.get_text_config().num_hidden_layers)
            self._scheduler = self._processor.scheduler
            self._processor.model_runner._sample = self._sample
            cache.search_prefix_match = self._search_prefix_match
            completes = "mark_complete_blocks"
            if not hasattr(cache, completes):
                completes = "mark_shareable_blocks_as_complete"  # 5.17
            getattr(cache, completes)
            setattr(cache, completes, self._register_complete_blocks)
        except (AttributeError, TypeError, ImportError) as exc:
            raise ConfigError(
                f"transformers {transformers.__version__} lacks what the engine builds on ({exc}); "
                "install transformers>=5.17,<5.24"
            ) from exc

    def add(self, entry: Entry) -> None:
        """Let a sequence take part from the next step on."""
        self._entries[entry.name] = entry
        state = RequestState(
            request_id=entry.name,
            initial_tokens=entry.chain.token_ids(),
            max_new_tokens=entry.max_tokens,
            eos_token_id=list(entry.stop_token_ids) or _NO_TOKEN,
        )
        self._scheduler.add_waiting_request(state)

    def cancel(self, name: str) -> None:
        """End a sequence, and free its blocks."""
        self._scheduler.set_request_cancellation(name)
        # At once, since the library would free the blocks of several in the order of a set, which differs from process
        # to process: tensor-parallel ranks would then not evict the same.
        self._scheduler.clear_cancelled_requests()
        # After it preempted a sequence, the library admits none until one finishes; if all others are cancelled
        # instead, it waits for ever.
        self._scheduler.block_new_requests = False
        self._forget(name)

    def step(self, on_scheduled: Callable[[list[tuple[str, int]]], None]) -> bool:
        """Compute one step; False if there was nothing to do.

        Args:
            on_scheduled: Told, before the forward pass, which sequences take part, and with how many tokens.
        """
        if not self._processor.prepare_next_batch():
            return False
        batch = self._processor.inputs_and_outputs.requests_in_batch
        on_scheduled([(future.state.request_id, future.query_length) for future in batch])
        stream = self._processor.inputs_and_outputs.compute_stream
        if stream is not None:
            # The library computes on a stream of its own, and does not wait for what it has just put into its inputs
            # on this thread's; nor for what the sampler's rows were made of.
            stream.wait_stream(torch.cuda.current_stream())
        self._processor._generation_step(self._model)
        self._processor.update_batch()
        for name in [name for name in self._entries if not self._is_live(name)]:
            self._forget(name)
        return True

    def drop_step(self) -> list[str]:
        """After `step` failed: free all sequences that have begun, and return their names.

        Where it failed is not known, so any of them may count tokens as computed that are not.
        """
        names = list(self._scheduler.active_requests)
        for name in names:
            self.cancel(name)
        return names

    def forget_cached(self) -> None:
        """Drop the content of all blocks that nobody uses."""
        self.ledger.forget_cached()

    def begin_scoring(self, prompt: npt.NDArray[np.uint32], chunk_tokens: int) -> PromptForward:
        """Make a forward pass over a prompt, beside the batch and without its cache.

        Args:
            prompt: (prompt_tokens,).
            chunk_tokens: Tokens that are computed at once, at most.
        """
        return PromptForward(self._model, prompt, chunk_tokens)

    def scrub(self) -> None:
        """Forget all that is cached, and overwrite every block that no sequence holds.

        For after a sequence that had values that are not finite: paged attention reads a block to its end, and what a
        mask multiplies with zero must be finite.
        """
        self.ledger.forget_cached()
        held = {block for name in self._entries for block in self.ledger.blocks_of(name)}
        views: PageViews | None = getattr(self._processor.cache, "raytrt_views", None)
        if views is not None:
            views.zero_all_but(held)

    def num_preempted(self) -> int:
        """Return how many sequences wait inside the library, mostly since their blocks went to older ones."""
        return sum(name not in self._scheduler.active_requests for name in self._entries)

    def matching_blocks(self, chain: BlockChain) -> list[int]:
        """Return the blocks that a sequence would find in the cache, never all of its last token's."""
        if not self.shares_prefixes:
            return []
        blocks: list[int] = []
        for index in range((chain.num_tokens - 1) // self._options.tokens_per_block):
            block = self.ledger.shared.get(chain.key(index))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _is_live(self, name: str) -> bool:
        return name in self._scheduler.active_requests or name in self._scheduler.waiting_requests

    def _forget(self, name: str) -> None:
        self._entries.pop(name, None)
        self._registered.pop(name, None)

    def _sample(self, scores: torch.Tensor, output_ids: torch.Tensor) -> None:
        """In the place of the library's own sampler, which has one set of parameters for all sequences.

        Args:
            scores: (1, num_rows, vocab_size); rows beyond the sequences that end their prefill or decode are padding.
            output_ids: (1, max_num_tokens + 1), int32; receives the tokens.
        """
        batch = self._processor.inputs_and_outputs.requests_in_batch
        names = [future.state.request_id for future in batch if future.has_new_token]
        if names:
            tokens = self._choose(scores[0, : len(names)], names)
            output_ids[0, : len(names)] = torch.tensor(tokens, dtype=output_ids.dtype, device=output_ids.device)

    def _search_prefix_match(self, name: str, _tokens: Sequence[int]) -> int:
        """In the place of the library's own, which would hash the tokens without their salt. See `ledger.py`."""
        blocks = self.matching_blocks(self._entries[name].chain)
        if blocks:
            self.ledger.share(name, blocks)
        self._registered[name] = len(blocks)
        matched = len(blocks) * self._options.tokens_per_block
        self._on_match(name, matched)
        return matched

    def _register_complete_blocks(self, state: Any, _count: Any) -> None:
        """In the place of the library's own: make the blocks that this step completed reusable. See `ledger.py`."""
        name = state.request_id
        if not self.shares_prefixes or name not in self._entries:
            return
        chain, complete = self._entries[name].chain, state.position_offset // self._options.tokens_per_block
        for index in range(self._registered.get(name, 0), min(complete, len(self.ledger.blocks_of(name)))):
            self.events.publish(chain.key(index), *chain.published(index))
            self.ledger.register(name, index, chain.key(index))
            self._registered[name] = index + 1


MakeBatcher = Callable[
    [Any, BatchOptions, Callable[[torch.Tensor, list[str]], list[int]], Callable[[str, int], None]], Batcher
]


class _Manager(ContinuousBatchingManager):  # type: ignore[misc]  # the library is untyped here
    """Makes the parts, and never runs."""

    def switch_to_cb_friendly_attn(self, model: Any, *_: Any) -> None:
        """Keep the attention that `loading` chose; the library's own choice may download kernels."""
        paged = f"paged|{model.config._attn_implementation}"
        if paged in transformers.AttentionInterface():  # up to 5.18 only
            model.set_attn_implementation(paged)


class _Discard:
    """Takes the outputs that the library delivers; the sampler has them already."""

    def deliver(self, output: Any) -> None: ...

    def deliver_batch(self, outputs: Any) -> None: ...

    def fail_and_deliver(self, state: Any, error: Exception) -> None: ...


def _make_processor(model: Any, options: BatchOptions) -> Any:
    config_class = transformers.ContinuousBatchingConfig
    known = {field.name for field in fields(config_class)}
    block_size = "page_size" if "page_size" in known else "block_size"  # 5.17
    optional = {"auto_switch_to_flash": False}
    attention = model.config._attn_implementation
    num_pages = -(-options.context_tokens // options.tokens_per_block) + 1
    # flash-attn reads pages of 256 tokens, or several times as many, through a block table, and no others.
    flash_pages = num_pages if "flash" in attention and options.tokens_per_block % 256 == 0 else 0
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)  # reports every request and every eviction
    config = config_class(
        **{block_size: options.tokens_per_block},
        **{name: value for name, value in optional.items() if name in known},
        num_blocks=options.num_blocks,
        max_batch_tokens=options.max_num_tokens,
        max_requests_per_batch=options.max_batch_size,
        max_blocks_per_request=flash_pages,
        max_memory_percent=1.0,
        allow_block_sharing=options.prefix_sharing,
        use_async_batching=False,  # it runs the next step before the host has seen this one's tokens
        use_cuda_graph=False,  # it would record the sampler, which does not do the same twice
        safety_margin=0.0,  # admission is ours; below the margin 5.23 evicts the whole prefix cache
    )
    generation = transformers.GenerationConfig(do_sample=False, eos_token_id=_NO_TOKEN)
    manager = _Manager(model=model, generation_config=generation, continuous_batching_config=config)
    manager.output_router = _Discard()
    if attention == PAGED:
        # The library offers block tables to flash-attn only; our attention reads them as well.
        manager.continuous_batching_config.max_blocks_per_request = num_pages
    return manager._create_batch_processor()


def _page_views(cache: Any, num_layers: int) -> PageViews:
    if hasattr(cache, "cache_allocators"):
        pages = {i: cache.layer_to_allocator[i].get_cache_for_block_table(i) for i in range(num_layers)}
        stride = cache.layer_to_allocator[0].block_physical_stride // cache.layer_to_allocator[0].tokens_per_page
        return PageViews(pages, trash_page=0, pages_per_block=stride)
    shape = (-1, cache.block_size, cache.num_key_value_heads, cache.head_dim)
    in_group = {i: cache.layer_index_to_group_indices[i][1] for i in range(num_layers)}
    views = {i: (cache.key_cache[j].view(*shape), cache.value_cache[j].view(*shape)) for i, j in in_group.items()}
    return PageViews(views, trash_page=cache.num_blocks)
