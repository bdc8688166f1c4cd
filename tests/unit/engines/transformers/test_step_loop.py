"""The step loop on a real model and the library's real scheduler and cache: content, events and results stay right."""

import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.core.blocks import block_hashes, chain_seed
from serve.core.kv_events import KvLedger, KvRemoved, KvStored
from serve.core.request import FinishReason, GenerateRequest, SamplingParams, TokenDelta, pack_tokens
from serve.engines.protocol import EngineStats
from serve.engines.transformers.generation import Generation
from serve.engines.transformers.loading import LoadedModel, load_model
from serve.engines.transformers.settings import TransformersSettings
from serve.engines.transformers.step_loop import StepLoop
from serve.engines.transformers.stream import Stream
from serve.errors import Overloaded, RequestError
from tests.unit.engines.transformers.tiny_model import VOCAB_SIZE, make_tiny_model

SIZE = 4  # tokens per block


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    torch.set_num_threads(1)
    checkpoint = make_tiny_model(tmp_path_factory.mktemp("tiny"))
    return load_model(checkpoint, TransformersSettings(device="cpu", tokens_per_block=SIZE, kv_cache_tokens=4096))


class Mirror(KvLedger):
    """Follows the events as a consumer does, and checks that each says something new."""

    def __init__(self) -> None:
        super().__init__()
        self.parents: dict[int, int] = {}

    def record(self, events: Iterable[KvStored | KvRemoved]) -> None:
        events = tuple(events)
        super().record(events)
        for event in events:
            if isinstance(event, KvRemoved):
                for block_hash in event.block_hashes:
                    del self.parents[block_hash]
                continue
            parent = event.parent
            for block_hash in event.block_hashes:
                assert block_hash not in self.parents
                self.parents[block_hash] = parent
                parent = block_hash


@dataclass
class Run:
    """One request under test, and what came of it."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    salt: str
    generation: Generation
    deltas: list[TokenDelta] = field(default_factory=list)
    error: Exception | None = None
    is_cancelled: bool = False

    @property
    def is_live(self) -> bool:
        return not (self.is_cancelled or self.error or (self.deltas and self.deltas[-1].finish_reason))

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]


class Bench:
    """A step loop under observation: every tick checks all that must always be true."""

    def __init__(self, loaded: LoadedModel, num_blocks: int = 200, max_num_tokens: int = 64, **options: Any) -> None:
        sizes = {"tokens_per_block": SIZE, "max_batch_size": 6, **options}
        self.mirror = Mirror()
        self.steps = StepLoop(
            replace(loaded, num_blocks=num_blocks, max_num_tokens=max_num_tokens),
            TransformersSettings(**sizes),
            self.mirror,
        )
        self.ledger = self.steps._batcher.ledger
        self.runs: list[Run] = []

    def submit(self, prompt: Iterable[int], salt: str = "", **sampling: Any) -> Run:
        prompt, params = tuple(prompt), SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **sampling})
        request = GenerateRequest(str(len(self.runs)), "m", pack_tokens(prompt), params, salt)
        generation = Generation(request.request_id, request, Stream(), time.monotonic())
        run = Run(prompt, params, salt, generation)
        self.runs.append(run)
        with torch.inference_mode():
            self.steps.accept(generation)
        return run

    def cancel(self, run: Run) -> None:
        run.is_cancelled = True
        self.steps.cancel(run.generation.name)

    def tick(self) -> None:
        with torch.inference_mode():
            deliveries = self.steps.tick()
        for stream, item in deliveries:
            (run,) = (run for run in self.runs if run.generation.stream is stream)
            assert run.is_live
            if isinstance(item, Exception):
                run.error = item
            else:
                run.deltas.append(item)
        self.check()

    def finish(self) -> None:
        for _ in range(2000):
            if not self.steps.is_busy:
                break
            self.tick()
        assert not self.steps.is_busy, "no end"
        self.tick()  # what was cancelled last is freed by the next step
        assert self.steps.stats().used_blocks == 0
        # Nothing is remembered of what is over.
        batcher: Any = self.steps._batcher
        scheduler = batcher._scheduler
        remembered = (scheduler.active_requests, scheduler.waiting_requests, scheduler.waiting_requests_order)
        assert not any((batcher._entries, batcher._registered, *remembered))
        assert len(batcher.events._published) == len(self.ledger.shared)

    def check(self) -> None:
        # The events add up to the library's own table.
        content = self.steps.cache_content()
        assert self.mirror.parents.keys() == content == self.mirror.content()
        assert len(content) == len(self.ledger.shared)
        # Whatever is there can be reached from its beginning.
        roots = {chain_seed(run.salt) for run in self.runs}
        assert all(parent in content or parent in roots for parent in self.mirror.parents.values())
        # Every block is free, cached or held, and is in one of these only.
        held = {block for run in self.runs for block in self.ledger.blocks_of(run.generation.name)}
        free, cached = self.ledger.free_and_cached()
        assert len(held) + free + cached == self.ledger.total_blocks
        assert self.ledger.num_cached(list(held)) == 0
        stats = self.steps.stats()
        assert stats.used_blocks == len(held)
        assert stats.cached_blocks == cached
        assert stats.running <= 6

    def check_what_is_found(self, run: Run) -> None:
        """Check that prompt and output would find exactly the blocks that the events say are there."""
        tokens = run.generation.chain.token_ids()
        hashes = block_hashes(tokens, SIZE, chain_seed(run.salt)).tolist()
        hits = next((i for i, block_hash in enumerate(hashes) if block_hash not in self.mirror.parents), len(hashes))
        found = self.steps._batcher.matching_blocks(run.generation.chain)
        assert len(found) == min(hits, (len(tokens) - 1) // SIZE)


def prompt_of(seed: int, length: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(VOCAB_SIZE), k=length))


STEMS = [prompt_of(seed, 24) for seed in range(3)]
prompts = st.builds(
    lambda stem, kept, own, length: STEMS[stem][:kept] + prompt_of(100 + own, length),
    st.integers(0, 2),
    st.integers(0, 24),
    st.integers(0, 3),
    st.integers(1, 14),
)
submissions = st.tuples(st.just("submit"), prompts, st.integers(1, 14), st.sampled_from(["", "", "salt"]))
operations = st.lists(
    submissions | st.tuples(st.just("tick"), st.integers(1, 6)) | st.tuples(st.just("cancel"), st.integers(0, 30)),
    min_size=5,
    max_size=25,
)


@pytest.fixture(scope="module")
def expected(loaded: LoadedModel) -> dict[tuple[int, ...], list[int]]:
    """Greedy continuations, each computed alone without prefix sharing; filled as they are asked for."""
    return {}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(operations, st.integers(15, 40), st.sampled_from([9, 30]))
def test_any_history_leaves_the_cache_and_the_results_right(
    loaded: LoadedModel,
    expected: dict[tuple[int, ...], list[int]],
    history: list[tuple[Any, ...]],
    num_blocks: int,
    max_num_tokens: int,
) -> None:
    bench = Bench(loaded, num_blocks, max_num_tokens)
    for operation, *args in history:
        if operation == "submit":
            prompt, max_tokens, salt = args
            bench.submit(prompt, salt, max_tokens=max_tokens)
        elif operation == "tick":
            for _ in range(args[0]):
                bench.tick()
        elif live := [run for run in bench.runs if run.is_live]:
            bench.cancel(live[args[0] % len(live)])
    bench.finish()
    for run in bench.runs:
        bench.check_what_is_found(run)
        if not run.is_cancelled:
            assert run.tokens == alone(loaded, expected, run)


def alone(loaded: LoadedModel, expected: dict[tuple[int, ...], list[int]], run: Run) -> list[int]:
    if run.prompt not in expected:
        bench = Bench(loaded, prefix_sharing=False)
        only = bench.submit(run.prompt, max_tokens=14)
        bench.finish()
        expected[run.prompt] = only.tokens
    return expected[run.prompt][: run.sampling.max_tokens]


def test_a_full_cache_throws_sequences_out_and_they_still_end_right(loaded: LoadedModel) -> None:
    prompts_ = [prompt_of(seed, 9) for seed in range(5)]
    roomy = Bench(loaded)
    wanted = [roomy.submit(prompt, max_tokens=40) for prompt in prompts_]
    roomy.finish()
    tight = Bench(loaded, num_blocks=24)
    preempted = 0
    runs = [tight.submit(prompt, max_tokens=40) for prompt in prompts_]
    while tight.steps.is_busy:
        tight.tick()
        preempted += tight.steps._batcher.num_preempted()
    assert preempted > 0, "the case is not what it is meant to be"
    assert [run.tokens for run in runs] == [run.tokens for run in wanted]
    assert all(len(run.deltas) == 40 for run in runs)


def test_when_all_others_are_cancelled_a_preempted_sequence_goes_on(loaded: LoadedModel) -> None:
    bench = Bench(loaded, num_blocks=24)
    runs = [bench.submit(prompt_of(seed, 9), max_tokens=40) for seed in range(5)]
    while bench.steps._batcher.num_preempted() == 0:
        bench.tick()
    active = bench.steps._batcher._scheduler.active_requests
    for run in runs:
        if run.generation.name in active:
            bench.cancel(run)
    bench.finish()
    assert all(run.is_cancelled or len(run.tokens) == 40 for run in runs)


def test_least_recently_used_blocks_go_first(loaded: LoadedModel) -> None:
    bench = Bench(loaded, num_blocks=16)
    old, kept = prompt_of(1, 21), prompt_of(2, 21)
    for prompt in (old, kept, old, kept):  # five blocks each
        bench.submit(prompt, max_tokens=1)
        bench.finish()
    bench.submit(prompt_of(3, 33), max_tokens=1)
    bench.finish()
    again = bench.submit(kept, max_tokens=1)
    bench.finish()
    assert again.generation.cached_tokens == 20
    assert 0 < len(bench.steps._batcher.matching_blocks(bench.runs[0].generation.chain)) < 5  # its end went first


def test_a_prompt_that_is_asked_for_several_times_at_once_is_computed_once(loaded: LoadedModel) -> None:
    bench = Bench(loaded, max_num_tokens=16)
    common, rest = prompt_of(1, 61), prompt_of(2, 9)
    runs = [bench.submit(prompt, max_tokens=3) for prompt in (common, common, rest, common + rest, common)]
    bench.submit(common, salt="other", max_tokens=3)
    bench.tick()
    assert bench.steps.stats().running == 3  # who follows waits, who has nothing in common does not
    bench.finish()
    assert [run.generation.cached_tokens for run in runs] == [0, 60, 0, 60, 60]
    assert runs[0].tokens == runs[1].tokens == runs[4].tokens
    computed = sum(run.generation.computed_tokens for run in bench.runs)
    assert computed == 61 + 61 + 9 + 10 + 2 * 1 + 6 * 2  # prompts, then two steps of decoding each


def test_who_follows_goes_on_alone_if_the_one_ahead_is_cancelled(loaded: LoadedModel) -> None:
    bench = Bench(loaded, max_num_tokens=16)
    ahead, behind = (bench.submit(prompt_of(1, 61), max_tokens=3) for _ in range(2))
    bench.tick()
    bench.cancel(ahead)
    bench.finish()
    assert len(behind.tokens) == 3
    assert behind.generation.cached_tokens == 16


def test_a_prompt_is_cached_even_if_its_output_is_one_token(loaded: LoadedModel) -> None:
    bench = Bench(loaded)
    prompt = prompt_of(1, 13)
    for cached_tokens in (0, 12):
        run = bench.submit(prompt, max_tokens=1)
        bench.finish()
        assert run.deltas[0].prefill is not None
        assert run.deltas[0].prefill.cached_tokens == cached_tokens


def test_warming_up_leaves_no_trace(loaded: LoadedModel) -> None:
    bench = Bench(loaded)
    with torch.inference_mode():
        bench.steps.warm_up()
    bench.check()
    stats = bench.steps.stats()
    assert stats == EngineStats(total_blocks=stats.total_blocks, step_s=stats.step_s)
    assert not bench.mirror.parents


def test_a_step_without_memory_ends_its_sequences_and_no_others(loaded: LoadedModel) -> None:
    bench = Bench(loaded, max_batch_size=2, max_num_tokens=40)
    first, second, third = (bench.submit(prompt_of(seed, 12), max_tokens=12) for seed in range(3))
    bench.tick()
    batcher: Any = bench.steps._batcher
    step = batcher._processor._generation_step

    def out_of_memory(model: Any) -> None:
        batcher._processor._generation_step = step
        raise torch.OutOfMemoryError("CUDA out of memory")

    batcher._processor._generation_step = out_of_memory
    bench.tick()
    assert isinstance(first.error, Overloaded)
    assert isinstance(second.error, Overloaded)
    assert bench.steps.stats().used_blocks == 0
    bench.finish()
    assert len(third.tokens) == 12
    again = bench.submit(first.prompt, max_tokens=12)
    bench.finish()
    assert again.tokens[: len(first.tokens)] == first.tokens


def test_memory_that_never_suffices_is_the_end(loaded: LoadedModel) -> None:
    bench = Bench(loaded)

    def out_of_memory(model: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    processor: Any = bench.steps._batcher._processor
    processor._generation_step = out_of_memory
    for seed in range(2):
        bench.submit(prompt_of(seed, 12))
        bench.tick()
    bench.submit(prompt_of(3, 12))
    with pytest.raises(torch.OutOfMemoryError):
        bench.tick()


def test_logits_that_are_not_finite_end_one_sequence(loaded: LoadedModel) -> None:
    bench = Bench(loaded)
    good, bad = bench.submit(prompt_of(1, 12), max_tokens=12), bench.submit(prompt_of(2, 12), max_tokens=12)
    bench.tick()
    (keys, values) = bench.steps._batcher._processor.cache.raytrt_views.slots[0]
    del keys
    block = bench.ledger.blocks_of(bad.generation.name)[0]
    stride = bench.steps._batcher._processor.cache.raytrt_views._pages_per_block
    with torch.inference_mode():
        values[block * stride * SIZE] = torch.nan  # as float16 that overflowed leaves it
    bench.tick()
    assert isinstance(bad.error, RequestError)
    bench.finish()
    clean = Bench(loaded)
    wanted = [clean.submit(run.prompt, max_tokens=12) for run in (good, bad)]
    clean.finish()
    again = bench.submit(bad.prompt, max_tokens=12)
    bench.finish()
    assert [good.tokens, again.tokens] == [run.tokens for run in wanted]


def test_sequences_advance_while_a_long_prompt_is_computed_in_chunks(loaded: LoadedModel) -> None:
    bench = Bench(loaded, max_num_tokens=16)
    short = bench.submit(prompt_of(1, 5), max_tokens=30)
    bench.tick()
    long = bench.submit(prompt_of(2, 200), max_tokens=2)
    while not long.tokens:
        before = len(short.tokens)
        bench.tick()
        assert len(short.tokens) == before + 1 or not short.is_live
    assert len(short.tokens) > 10
    bench.finish()


def test_the_prompt_is_scored_between_steps(loaded: LoadedModel) -> None:
    bench = Bench(loaded, max_num_tokens=16)
    running = bench.submit(prompt_of(1, 5), max_tokens=30)
    bench.tick()
    scored = bench.submit(prompt_of(2, 100), max_tokens=0, prompt_logprobs=3)
    while not scored.deltas:
        before = len(running.tokens)
        bench.tick()
        assert len(running.tokens) == before + 1
    (delta,) = scored.deltas
    assert delta.finish_reason is FinishReason.LENGTH
    assert delta.prefill is not None
    entries = delta.prefill.prompt_logprobs
    assert entries is not None
    with torch.no_grad():
        logprobs = loaded.model(torch.tensor([scored.prompt])).logits[0].log_softmax(-1)
    for i, entry in enumerate(entries[1:]):
        assert entry is not None
        assert entry.token_id == scored.prompt[i + 1]
        assert entry.logprob == pytest.approx(logprobs[i, entry.token_id].item(), abs=1e-4)
        assert [value for _, value in entry.top] == pytest.approx(logprobs[i].topk(3).values.tolist(), abs=1e-4)
    bench.finish()


def test_a_cancelled_prompt_is_not_scored_to_its_end(loaded: LoadedModel) -> None:
    bench = Bench(loaded, max_num_tokens=16)
    run = bench.submit(prompt_of(2, 100), prompt_logprobs=0)
    bench.tick()
    bench.cancel(run)
    assert not bench.steps.is_busy


def test_what_the_engine_says_of_its_load(loaded: LoadedModel, tmp_path: Path) -> None:
    bench = Bench(loaded, max_batch_size=2, max_num_tokens=10)
    bench.submit(prompt_of(1, 12), max_tokens=3)
    bench.submit(prompt_of(2, 30), max_tokens=3)
    bench.submit(prompt_of(3, 20), max_tokens=3)
    assert bench.steps.stats().queued_prefill_tokens == 62
    assert bench.steps.stats().waiting == 3
    bench.tick()
    stats = bench.steps.stats()
    assert (stats.running, stats.waiting, stats.steps) == (2, 1, 1)
    assert stats.queued_prefill_tokens == 52
    bench.finish()
    stats = bench.steps.stats()
    assert (stats.prompt_tokens, stats.generated_tokens, stats.queued_prefill_tokens) == (62, 9, 0)
    assert stats.computed_prompt_tokens == 62
    assert stats.computed_prompt_pairs == sum(tokens * (tokens + 1) / 2 for tokens in (12, 30, 20))
    assert stats.step_s > 0
    assert stats.busy_s > stats.step_s
