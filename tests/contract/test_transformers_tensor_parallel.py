"""Tensor parallelism: two real processes over gloo pass the conformance suite, compute what one does, end as one."""

import asyncio
import random
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, Phi3Config
from transformers.utils import logging as library_logging

from serve.core.request import GenerateRequest, SamplingParams, TokenDelta, pack_tokens
from serve.engines.protocol import Engine
from serve.engines.transformers.engine import TransformersEngine
from serve.engines.transformers.settings import TransformersSettings
from serve.engines.transformers.tensor_parallel import TensorRank, open_store, run_follower
from serve.errors import ConfigError, EngineDead
from tests.contract.engine_conformance import EngineConformance
from tests.contract.engine_conformance_case import GREEDY, EngineCase, EngineLimits
from tests.contract.tensor_followers import HOST, TensorEngine, follow
from tests.forks import fork_server
from tests.unit.engines.transformers.tiny_model import TINY, VOCAB_SIZE, make_tiny_model

SIZES: dict[str, Any] = {"device": "cpu", "num_threads": 1, "tokens_per_block": 8}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine_case(checkpoint: Path) -> EngineCase:
    def make_engine(limits: EngineLimits | None = None) -> TransformersEngine:
        limits = limits or EngineLimits()
        blocks = limits.total_blocks or 1024
        return TensorEngine(
            checkpoint, TransformersSettings(**{**SIZES, "kv_cache_tokens": 8 * blocks, **limits.queue})
        )

    async def kill(engine: Engine) -> None:
        assert isinstance(engine, TensorEngine)
        engine.kill_followers()

    def cache_content(engine: Engine) -> frozenset[int]:
        assert isinstance(engine, TransformersEngine)
        return engine.cache_content()

    return EngineCase(make_engine=make_engine, token_ids=range(VOCAB_SIZE), kill=kill, cache_content=cache_content)


class TestTransformersTensorParallel(EngineConformance):
    pass


QUICKSTART = Path(__file__).parents[2] / "serve/models/quickstart"
SMALL = TransformersSettings(**SIZES, kv_cache_tokens=1024, warm_up=False)


@dataclass(frozen=True)
class Result:
    """What a request got: its tokens, the tokens of the prompt that were scored, and all log probabilities."""

    tokens: tuple[int, ...]
    scored: tuple[int, ...]
    logprobs: list[float]


async def generate(engine: TransformersEngine, name: str, prompt: list[int], **sampling: Any) -> list[TokenDelta]:
    request = GenerateRequest(name, "m", pack_tokens(prompt), SamplingParams(**{**GREEDY, **sampling}))
    return [delta async for delta in engine.generate(request)]


async def whole_run(engine: TransformersEngine) -> list[Result]:
    """Start, send many requests of every kind at once, and stop; what each of them got."""
    await engine.start()
    vocab_size = engine.info.vocab_size
    kinds: list[dict[str, Any]] = [{}, {"prompt_logprobs": 3}, {"temperature": 1.2, "seed": 3, "top_p": 0.9}]
    runs = []
    for i in range(9):
        prompt = random.Random(i % 6).choices(range(vocab_size), k=10 + 37 * (i % 6))
        runs.append(generate(engine, str(i), prompt, max_tokens=30, logprobs=2, **kinds[i % 3]))
    results = await asyncio.gather(*runs)
    assert engine.stats().used_blocks == 0
    await engine.stop()
    return [result_of(deltas) for deltas in results]


def result_of(deltas: list[TokenDelta]) -> Result:
    prefill = deltas[0].prefill
    assert prefill is not None
    scored = [entry for entry in prefill.prompt_logprobs or () if entry is not None]
    drawn = [entry for delta in deltas for entry in delta.logprobs or ()]
    tokens = tuple(token for delta in deltas for token in delta.token_ids)
    return Result(tokens, tuple(entry.token_id for entry in scored), [entry.logprob for entry in scored + drawn])


async def check_equal(model_dir: Path, settings: TransformersSettings) -> None:
    """Compare two ranks with one."""
    two = TensorEngine(model_dir, settings)
    results = zip(await whole_run(two), await whole_run(TransformersEngine(model_dir, settings)), strict=True)
    assert two.exit_codes() == [0]
    for own, expected in results:
        assert (own.tokens, own.scored) == (expected.tokens, expected.scored)
        assert own.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


async def test_two_ranks_compute_what_one_does_of_the_quickstart_model() -> None:
    settings = TransformersSettings(device="cpu", dtype="float32", num_threads=1, kv_cache_tokens=4096)
    await check_equal(QUICKSTART, settings)


OTHER_MODELS: dict[str, Any] = {
    "sliding windows": Gemma3TextConfig(**{**TINY, "num_hidden_layers": 4}, head_dim=16, sliding_window=16),
    "heads that stay together": Phi3Config(**TINY, pad_token_id=0),
}


@pytest.mark.parametrize("kind", OTHER_MODELS)
async def test_two_ranks_compute_what_one_does_of_other_models(kind: str, tmp_path: Path) -> None:
    make_tiny_model_of(tmp_path, OTHER_MODELS[kind])
    await check_equal(tmp_path, SMALL)


async def test_prompts_in_chunks_and_a_cache_that_is_too_small_for_all(checkpoint: Path) -> None:
    settings = TransformersSettings(**SIZES, kv_cache_tokens=512, max_num_tokens=20, max_batch_size=8)
    await check_equal(checkpoint, settings)


async def test_the_cache_is_as_large_as_the_smallest_rank_has_room_for(checkpoint: Path) -> None:
    less = SMALL.model_copy(update={"kv_cache_tokens": 512})
    engine = TensorEngine(checkpoint, SMALL, follower_settings=less)
    await engine.start()
    assert (engine.info.total_blocks, engine.stats().total_blocks) == (64, 64)
    await engine.stop()


async def test_a_cache_that_does_not_fit_the_memory_is_refused_by_all(checkpoint: Path) -> None:
    engine = TensorEngine(checkpoint, SMALL.model_copy(update={"kv_cache_tokens": 2**40}))
    with pytest.raises(ConfigError, match="kv_cache_tokens"):
        await engine.start()
    await engine.stop()
    assert engine.exit_codes() == [1]


async def test_ranks_with_different_checkpoints_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path, rms_norm_eps=1e-4)
    engine = TensorEngine(checkpoint, SMALL, run=partial(follow_with, other))
    with pytest.raises(ConfigError, match="tensor rank 1"):
        await engine.start()
    await engine.stop()


def follow_with(other_dir: Path, _model_dir: Path, settings: TransformersSettings, rank: TensorRank) -> None:
    follow(other_dir, settings, rank)


async def test_what_is_wrong_on_another_rank_is_said_by_the_first(checkpoint: Path, tmp_path: Path) -> None:
    engine = TensorEngine(checkpoint, SMALL, run=partial(follow_with, tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"tensor rank 1.*none"):
        await engine.start()
    with pytest.raises(EngineDead):
        engine.check_health()
    await engine.stop()


async def test_a_model_that_cannot_be_split_is_refused(tmp_path: Path) -> None:
    engine = TensorEngine(make_tiny_model(tmp_path, num_key_value_heads=1), SMALL)
    with pytest.raises(ConfigError, match="num_key_value_heads=1"):
        await engine.start()
    await engine.stop()


async def test_followers_that_do_not_come_end_the_start(checkpoint: Path) -> None:
    store, port = open_store(HOST)
    engine = TransformersEngine(checkpoint, SMALL, TensorRank(0, 3, HOST, port, None, timeout_s=0.3))
    with pytest.raises(EngineDead, match=r"\[1, 2\] did not come"):
        await engine.start()
    await engine.stop()
    del store


async def test_a_stop_while_the_followers_are_awaited(checkpoint: Path) -> None:
    store, port = open_store(HOST)
    engine = TransformersEngine(checkpoint, SMALL, TensorRank(0, 2, HOST, port, None, timeout_s=600))
    starting = asyncio.ensure_future(engine.start())
    await asyncio.sleep(0)
    await engine.stop()
    assert isinstance((await asyncio.gather(starting, return_exceptions=True))[0], EngineDead)
    del store


async def test_an_idle_group_notices_that_a_rank_was_killed(checkpoint: Path) -> None:
    engine = TensorEngine(checkpoint, SMALL)
    await engine.start()
    engine.check_health()
    engine.kill_followers()
    with pytest.raises(EngineDead, match="tensor rank 1"):
        await checked_until_dead(engine)
    await engine.stop()


async def test_a_rank_that_hangs_makes_the_engine_unhealthy_and_does_not_hold_up_its_end(checkpoint: Path) -> None:
    engine = TensorEngine(checkpoint, SMALL.model_copy(update={"max_step_s": 0.5, "stop_timeout_s": 0.2}))
    await engine.start()
    engine.kill_followers(signal.SIGSTOP)
    reading = asyncio.ensure_future(generate(engine, "r", [1, 2, 3], max_tokens=5))
    with pytest.raises(EngineDead):
        await checked_until_dead(engine)
    await engine.stop()
    with pytest.raises(EngineDead):
        await reading
    engine.kill_followers()
    assert engine.exit_codes() == [-signal.SIGKILL]


async def checked_until_dead(engine: TransformersEngine) -> None:
    async with asyncio.timeout(60):
        while True:
            engine.check_health()
            await asyncio.sleep(0.01)


async def test_a_follower_idles_healthily_and_ends_when_the_leader_is_killed(checkpoint: Path) -> None:
    store, port = open_store(HOST)
    leader = fork_server().Process(target=lead, args=(checkpoint, SMALL, TensorRank(0, 2, HOST, port)))
    leader.start()
    beats = 0

    def beat() -> None:
        nonlocal beats
        beats += 1
        if beats == 8:  # of which the leader's orders at the start account for a few; the others were idle
            leader.kill()

    with pytest.raises(EngineDead, match="leader"):
        await asyncio.to_thread(run_follower, checkpoint, SMALL, TensorRank(1, 2, HOST, port), beat)
    assert beats >= 8
    await asyncio.to_thread(leader.join, 30)
    del store


def lead(model_dir: Path, settings: TransformersSettings, rank: TensorRank) -> None:
    """Be rank 0 until killed."""

    async def main() -> None:
        await TransformersEngine(model_dir, settings, rank).start()
        await asyncio.Event().wait()

    asyncio.run(main())


def make_tiny_model_of(directory: Path, config: Any) -> None:
    """Save a model of any kind, with weights as large as `make_tiny_model`'s."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    library_logging.disable_progress_bar()
    model.save_pretrained(directory)
