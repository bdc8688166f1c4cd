"""TrtllmEngine on a scripted LLM object: threads, loops, errors and ends."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from serve.core.request import FinishReason, GenerateRequest, SamplingParams, TokenDelta, pack_tokens
from serve.engines.trtllm.engine import TrtllmEngine
from serve.errors import EngineDead, Overloaded, RequestError, StreamLost
from tests.unit.engines.trtllm.scripted_llm import LibraryRequestError, ScriptedLlm, make_engine

DEADLINE_S = 10.0


def request(name: str = "r", tokens: int = 5, salt: str = "", **sampling: Any) -> GenerateRequest:
    params = SamplingParams(**{"max_tokens": 4, "temperature": 0.0, **sampling})
    return GenerateRequest(name, "m", pack_tokens(range(1, tokens + 1)), params, salt)


@asynccontextmanager
async def started(llm: ScriptedLlm, **settings: Any) -> AsyncIterator[TrtllmEngine]:
    engine = make_engine(llm, **settings)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()
    assert llm.shutdowns == 1
    assert not engine.is_stuck


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110  # nobody announces it
            await asyncio.sleep(0.001)


async def collect(engine: TrtllmEngine, asked: GenerateRequest) -> list[TokenDelta]:
    async with asyncio.timeout(DEADLINE_S):
        return [delta async for delta in engine.generate(asked)]


async def begun(llm: ScriptedLlm, engine: TrtllmEngine, asked: GenerateRequest) -> asyncio.Task[list[TokenDelta]]:
    """Have a request read, and wait until the library has it."""
    before = len(llm.outputs)
    reading = asyncio.ensure_future(collect(engine, asked))
    await until(lambda: len(llm.outputs) > before or reading.done())
    return reading


async def test_a_request_from_its_submission_to_its_end() -> None:
    llm = ScriptedLlm()
    async with started(llm) as engine:
        reading = await begun(llm, engine, request(salt="tenant"))
        assert (engine.stats().running, engine.stats().queued_prefill_tokens) == (1, 5)
        llm.outputs[0].respond(7, 8)
        llm.outputs[0].respond(9, finish="length")
        deltas = await reading
        assert [token for delta in deltas for token in delta.token_ids] == [7, 8, 9]
        assert deltas[-1].finish_reason is FinishReason.LENGTH
        assert (engine.stats().running, engine.stats().generated_tokens) == (0, 3)
    inputs, _, options = llm.asked[0]
    assert (inputs, options) == ([1, 2, 3, 4, 5], {"cache_salt": "tenant"})


async def test_trap_7_2_13_every_request_has_sampling_params_of_its_own() -> None:
    llm = ScriptedLlm()
    async with started(llm) as engine:
        params = SamplingParams(max_tokens=1, temperature=0.5)
        for name in "ab":
            reading = await begun(llm, engine, GenerateRequest(name, "m", pack_tokens([1]), params))
            llm.outputs[-1].respond(1, finish="length")
            await reading
    (_, one, _), (_, other, _) = llm.asked
    assert one is not other
    assert one["seed"] != other["seed"]
    assert "cache_salt" not in llm.asked[0][2]


async def test_trap_2_4_a_request_is_aborted_off_the_event_loop() -> None:
    llm = ScriptedLlm()
    async with started(llm) as engine:
        stream = engine.generate(request())
        waiting = asyncio.ensure_future(anext(stream))
        await until(lambda: llm.outputs)
        llm.outputs[0].respond(7)
        await waiting
        await stream.aclose()
        await until(lambda: llm.outputs[0].aborted_by)
        assert llm.outputs[0].aborted_by[0].startswith("trtllm-abort")
        assert engine.stats().running == 1  # it holds its blocks until the engine says that it has ended
        llm.outputs[0].respond(finish="cancelled")
        await until(lambda: engine.stats().running == 0)


async def test_trap_2_3_all_requests_are_made_on_the_loop_of_the_start() -> None:
    llm = ScriptedLlm()
    async with started(llm) as engine:
        errors: list[Exception] = []

        def elsewhere() -> None:
            try:
                asyncio.run(collect(engine, request()))
            except Exception as exc:
                errors.append(exc)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        await asyncio.to_thread(thread.join, DEADLINE_S)
        assert "one event loop" in str(errors[0])
        assert llm.outputs == []


async def test_an_error_of_one_request_leaves_the_engine() -> None:
    llm = ScriptedLlm()
    async with started(llm) as engine:
        reading = await begun(llm, engine, request())
        llm.outputs[0].fail(LibraryRequestError("the grammar is wrong"))
        with pytest.raises(RequestError, match="the grammar is wrong"):
            await reading
        engine.check_health()
        llm.refusal = LibraryRequestError("prompt length should not exceed max_num_tokens")
        with pytest.raises(RequestError, match="max_num_tokens"):
            await collect(engine, request())
        llm.refusal = ValueError("top_p must be positive")
        with pytest.raises(RequestError, match="top_p"):
            await collect(engine, request())
        engine.check_health()


@pytest.mark.parametrize(
    "error", [RuntimeError("LLM is shutting down"), LibraryRequestError("CUDA error: device-side assert triggered")]
)
@pytest.mark.parametrize("at_once", [True, False])
async def test_any_other_error_ends_every_request(error: Exception, at_once: bool) -> None:
    llm = ScriptedLlm()
    async with started(llm) as engine:
        other = await begun(llm, engine, request("other"))
        if at_once:
            llm.refusal = error
            with pytest.raises(EngineDead):
                await collect(engine, request())
        else:
            reading = await begun(llm, engine, request())
            llm.outputs[1].fail(error)
            with pytest.raises(EngineDead):
                await reading
        with pytest.raises(EngineDead):
            await other
        with pytest.raises(EngineDead):
            engine.check_health()
        assert (engine.stats().running, engine.stats().used_blocks) == (0, 0)


async def test_an_output_that_ends_without_a_reason_ends_its_stream_alone() -> None:
    llm = ScriptedLlm()
    async with started(llm) as engine:
        reading = await begun(llm, engine, request())
        llm.outputs[0].fail(StopAsyncIteration())
        with pytest.raises(StreamLost):
            await reading
        engine.check_health()


async def test_an_engine_that_says_it_is_ill_is_dead() -> None:
    llm = ScriptedLlm()
    async with started(llm) as engine:
        reading = await begun(llm, engine, request())
        llm.is_well = False
        with pytest.raises(EngineDead, match="not healthy"):
            await reading


async def test_prompt_logprobs_are_computed_without_reuse_and_come_with_the_first_delta() -> None:
    llm = ScriptedLlm()
    async with started(llm) as engine:
        reading = await begun(llm, engine, request(prompt_logprobs=1, salt="tenant"))
        output = llm.outputs[0]
        output.respond(7)  # no logits yet: nothing is told
        await until(output.responses.empty)
        output.context_logits = torch.zeros(5, 100)
        output.respond(8, finish="length")
        (delta,) = await reading
    assert delta.token_ids == (7, 8)
    assert delta.prefill is not None
    assert delta.prefill.prompt_logprobs is not None
    assert len(delta.prefill.prompt_logprobs) == 5
    assert llm.asked[0][2]["cache_salt"] != "tenant"


async def test_logit_bias_becomes_a_tensor_of_the_vocabulary() -> None:
    llm = ScriptedLlm()
    async with started(llm) as engine:
        reading = await begun(llm, engine, request(logit_bias={3: 2.5}))
        llm.outputs[0].respond(7, finish="length")
        await reading
    bias = llm.asked[0][1]["embedding_bias"]
    assert (bias.dtype, bias.shape) == (torch.float32, (100,))
    assert bias.nonzero().flatten().tolist() == [3]
    assert bias[3] == 2.5


async def test_a_prompt_that_does_not_fit_a_step_is_refused_without_chunks() -> None:
    llm = ScriptedLlm()
    async with started(llm, chunked_prefill=False, max_num_tokens=8) as engine:
        with pytest.raises(RequestError, match="chunked_prefill"):
            await collect(engine, request(tokens=9))
        with pytest.raises(RequestError, match="KV cache holds 256"):
            await collect(engine, request(tokens=8, max_tokens=300))


async def test_the_queue_is_limited_by_us() -> None:
    llm = ScriptedLlm()
    async with started(llm, max_batch_size=1, max_num_tokens=8, max_waiting=1) as engine:
        readings = [await begun(llm, engine, request(str(i))) for i in range(2)]
        assert (engine.stats().running, engine.stats().waiting) == (1, 1)
        with pytest.raises(Overloaded, match="max_waiting is 1"):
            await collect(engine, request("third"))
        for output in llm.outputs:
            output.respond(1, finish="length")
        await asyncio.gather(*readings)


async def test_a_stop_during_the_start_ends_it() -> None:
    llm = ScriptedLlm()
    engine = make_engine(llm)
    held = asyncio.Event()
    load = engine._load

    async def slow_load(*args: Any) -> Any:
        await held.wait()
        return await load(*args)

    engine._load = slow_load
    starting = asyncio.ensure_future(engine.start())
    await asyncio.sleep(0)
    await engine.stop()
    with pytest.raises(EngineDead, match="stopped"):
        await starting
    with pytest.raises(EngineDead):
        engine.check_health()
