"""The transformers engine passes the conformance suite, with each kind of attention and with prompts in chunks."""

import asyncio
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GptOssConfig, MambaConfig, Qwen3Config

from serve.core.request import GenerateRequest, SamplingParams, pack_tokens
from serve.engines.protocol import Engine
from serve.engines.transformers.engine import TransformersEngine
from serve.engines.transformers.settings import TransformersSettings
from serve.errors import ConfigError, EngineDead, RequestError
from tests.contract.engine_conformance import EngineConformance
from tests.contract.engine_conformance_case import GREEDY, EngineCase, EngineLimits, EngineProbe
from tests.unit.engines.transformers.tiny_model import TINY, VOCAB_SIZE, make_tiny_model

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "paged": {"attention": "paged", "max_num_tokens": 256},
    "chunked": {"attention": "paged", "max_num_tokens": 20, "max_batch_size": 16, "tokens_per_block": 4},
    "sdpa": {"attention": "sdpa", "max_num_tokens": 128},
    "unshared": {"attention": "paged", "prefix_sharing": False},
}
if torch.cuda.is_available():
    # In float32, so that tokens can be compared with those of the plain model.
    CONFIGURATIONS["cuda"] = {"device": "cuda", "dtype": "float32", "attention": "paged", "max_num_tokens": 256}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def engine_case(request: pytest.FixtureRequest, checkpoint: Path) -> EngineCase:
    configuration: dict[str, Any] = {
        "device": "cpu",
        "num_threads": 1,
        "tokens_per_block": 8,
        "kv_cache_tokens": 8192,
        **CONFIGURATIONS[request.param],
    }

    def make_engine(limits: EngineLimits | None = None) -> TransformersEngine:
        limits = limits or EngineLimits()
        given = limits.queue
        if limits.total_blocks is not None:
            given["kv_cache_tokens"] = limits.total_blocks * configuration["tokens_per_block"]
        return TransformersEngine(checkpoint, TransformersSettings(**{**configuration, **given}))

    async def kill(engine: Engine) -> None:
        assert isinstance(engine, TransformersEngine)
        _break(engine)

    def cache_content(engine: Engine) -> frozenset[int]:
        assert isinstance(engine, TransformersEngine)
        return engine.cache_content()

    return EngineCase(
        make_engine=make_engine,
        token_ids=range(VOCAB_SIZE),
        shares_prefixes=configuration.get("prefix_sharing", True),
        kill=kill,
        cache_content=cache_content,
    )


def _break(engine: TransformersEngine) -> None:
    """Let the next step fail, as it would if the GPU was lost."""

    def lost(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: device lost")

    steps_of(engine)._batcher._model.forward = lost


def steps_of(engine: TransformersEngine) -> Any:
    """Reach into a started engine for what a test wants to disturb."""
    assert engine._thread is not None
    return engine._thread.steps


class TestTransformersEngine(EngineConformance):
    pass


@pytest.mark.asyncio(loop_scope="module")
class TestAgainstThePlainModel:
    """What the engine computes is what the library's own `generate` and forward pass compute."""

    async def test_greedy_tokens(self, probe: EngineProbe, plain: Any) -> None:
        prompts = [probe.prompt(3 + 29 * i, ("plain", i)) for i in range(8)]
        results = await asyncio.gather(*(probe.run(prompt, max_tokens=20, **GREEDY) for prompt in prompts))
        for prompt, result in zip(prompts, results, strict=True):
            assert list(result.token_ids) == generate(plain, prompt, 20)

    async def test_logprobs(self, probe: EngineProbe, plain: Any) -> None:
        # With everything on that must not show in them.
        edits: dict[str, Any] = {"repetition_penalty": 1.3, "logit_bias": {5: 3.0}, "temperature": 0.7, "top_k": 9}
        prompt = probe.prompt(70, "plain logprobs")
        result = await probe.run(prompt, max_tokens=12, logprobs=4, prompt_logprobs=4, seed=1, **edits)
        expected = logprobs_of(plain, prompt + result.token_ids)
        assert result.prefill.prompt_logprobs is not None
        assert result.logprobs is not None
        entries = (*result.prefill.prompt_logprobs[1:], *result.logprobs)
        for row, entry in zip(expected, entries, strict=True):
            assert entry is not None
            assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
            assert [value for _, value in entry.top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)

    async def test_penalties(self, probe: EngineProbe, plain: Any) -> None:
        prompt = probe.prompt(40, "plain penalties")
        penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.9, "frequency_penalty": 0.6}
        result = await probe.run(prompt, max_tokens=25, logit_bias={7: 1.5}, **penalties, **GREEDY)
        output: list[int] = []
        for _ in range(25):
            row = plain(torch.tensor([[*prompt, *output]])).logits[0, -1]
            for token in set(prompt) | set(output):
                row[token] = row[token] / 1.2 if row[token] > 0 else row[token] * 1.2
            for token, count in Counter(output).items():
                row[token] -= 0.9 + 0.6 * count
            row[7] += 1.5
            output.append(int(row.argmax()))
        assert list(result.token_ids) == output

    async def test_a_seeded_stream_continues_from_what_was_generated(self, probe: EngineProbe) -> None:
        prompt, drawn = probe.prompt(25, "plain resume"), {"temperature": 1.3, "top_p": 0.9, "seed": 11}
        whole = (await probe.run(prompt, max_tokens=24, **drawn)).token_ids
        for done in (1, 7, 23):
            rest = await probe.run(prompt + whole[:done], max_tokens=24 - done, **drawn)
            assert whole[:done] + rest.token_ids == whole

    async def test_a_prompt_that_is_scored_is_also_continued(self, probe: EngineProbe, plain: Any) -> None:
        prompt = probe.prompt(33, "plain scored")
        result = await probe.run(prompt, max_tokens=9, prompt_logprobs=0, **GREEDY)
        assert list(result.token_ids) == generate(plain, prompt, 9)


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> Any:
    with torch.no_grad():
        yield AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def generate(model: Any, prompt: tuple[int, ...], max_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, eos_token_id=None
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def logprobs_of(model: Any, tokens: tuple[int, ...]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([tokens])).logits[0, :-1]
    return logits.log_softmax(-1)


def small(checkpoint: Path, **values: Any) -> TransformersEngine:
    sizes = {"device": "cpu", "num_threads": 1, "tokens_per_block": 8, "kv_cache_tokens": 2048, "warm_up": False}
    return TransformersEngine(checkpoint, TransformersSettings(**{**sizes, **values}))


OTHER_MODELS: dict[str, Callable[..., Any]] = {
    "sliding windows": partial(Gemma3TextConfig, head_dim=16, sliding_window=16),
    "attention sinks": partial(GptOssConfig, head_dim=16, sliding_window=16, num_local_experts=4),
    "grouped queries": Qwen3Config,
}


@pytest.mark.parametrize("kind", OTHER_MODELS)
async def test_other_kinds_of_attention(kind: str, tmp_path: Path) -> None:
    config = OTHER_MODELS[kind](**{**TINY, "num_hidden_layers": 4})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(tmp_path)
    engine = small(tmp_path)
    await engine.start()
    prompts = [tuple(range(3, 10 + 25 * i)) for i in range(4)]
    for i, prompt in enumerate(prompts * 2):
        request = GenerateRequest(str(i), "m", pack_tokens(prompt), SamplingParams(temperature=0.0, max_tokens=20))
        tokens = [token async for delta in engine.generate(request) for token in delta.token_ids]
        with torch.no_grad():
            assert tokens == generate(model, prompt, 20)
    assert engine.stats().used_blocks == 0
    await engine.stop()


async def test_a_kind_of_model_that_the_library_cannot_batch(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=64, num_hidden_layers=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    engine = small(tmp_path)
    with pytest.raises(ConfigError, match="continuous batching"):
        await engine.start()
    await engine.stop()


async def test_a_model_that_is_not_there_ends_the_start(tmp_path: Path) -> None:
    engine = small(tmp_path / "none")
    with pytest.raises(ConfigError, match="none"):
        await engine.start()
    with pytest.raises(EngineDead):
        engine.check_health()
    await engine.stop()


async def test_a_cache_that_does_not_fit_the_memory_is_refused(checkpoint: Path) -> None:
    engine = small(checkpoint, kv_cache_tokens=2**40)
    with pytest.raises(ConfigError, match="kv_cache_tokens"):
        await engine.start()
    await engine.stop()


async def test_a_request_id_in_flight_is_refused_and_may_come_again(checkpoint: Path) -> None:
    engine = small(checkpoint)
    await engine.start()
    request = GenerateRequest("same", "m", pack_tokens(range(9)), SamplingParams(max_tokens=200))
    stream = engine.generate(request)
    await anext(stream)
    with pytest.raises(RequestError, match="'same'"):
        await anext(engine.generate(request))
    await stream.aclose()
    stream = engine.generate(request)  # before the thread has heard of the end of the first
    assert (await anext(stream)).prefill is not None
    await stream.aclose()
    await engine.stop()


async def test_a_step_that_hangs_makes_the_engine_unhealthy(checkpoint: Path) -> None:
    engine = small(checkpoint, max_step_s=0.05, stop_timeout_s=0.1)
    await engine.start()
    release = threading.Event()
    steps_of(engine)._batcher._model.register_forward_pre_hook(lambda *_: release.wait(60) and None)
    reading = asyncio.ensure_future(
        anext(engine.generate(GenerateRequest("r", "m", pack_tokens(range(9)), SamplingParams(max_tokens=5))))
    )
    with pytest.raises(EngineDead, match="max_step_s"):
        await checked_until_unhealthy(engine)
    await engine.stop()  # does not wait for what hangs
    with pytest.raises(EngineDead):
        await reading
    release.set()
    await engine.stop()


async def checked_until_unhealthy(engine: TransformersEngine) -> None:
    async with asyncio.timeout(60):
        while True:
            engine.check_health()
            await asyncio.sleep(0.01)


async def test_a_stop_while_the_model_is_loaded(checkpoint: Path) -> None:
    engine = small(checkpoint)
    starting = asyncio.ensure_future(engine.start())
    await asyncio.sleep(0)
    await engine.stop()
    await asyncio.gather(starting, return_exceptions=True)
    with pytest.raises(EngineDead):
        engine.check_health()


def test_an_engine_that_nobody_stops_does_not_disturb_the_end_of_the_process(checkpoint: Path) -> None:
    code = f"""
import asyncio, pathlib
from serve.core.request import GenerateRequest, SamplingParams, pack_tokens
from serve.engines.transformers.engine import TransformersEngine
from serve.engines.transformers.settings import TransformersSettings
async def main():
    engine = TransformersEngine(pathlib.Path({str(checkpoint)!r}), TransformersSettings(kv_cache_tokens=1024))
    await engine.start()
    async for _ in engine.generate(GenerateRequest("r", "m", pack_tokens([1]), SamplingParams(max_tokens=300))):
        raise SystemExit(7)
asyncio.run(main())
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (7, "", "")


async def test_an_idle_engine_takes_no_processor_time(checkpoint: Path) -> None:
    engine = small(checkpoint)
    await engine.start()
    async for _ in engine.generate(GenerateRequest("r", "m", pack_tokens(range(9)), SamplingParams(max_tokens=5))):
        pass
    steps = steps_of(engine)
    assert not steps.is_busy
    ticks = 0
    tick = steps.tick

    def count() -> Any:
        nonlocal ticks
        ticks += 1
        return tick()

    steps.tick = count
    await asyncio.sleep(0.3)
    assert ticks == 0
    await engine.stop()
