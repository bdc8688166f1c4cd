"""TrtllmEngine when TensorRT-LLM fails: what the double can be told to do, on each line, with and without workers."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from serve.core.request import FinishReason, GenerateRequest, SamplingParams, TokenDelta, pack_tokens
from serve.errors import ConfigError, EngineDead, RequestError
from tests.contract.trtllm_host import QUICKSTART, HostedTrtllm
from tests.doubles.install import LineName, double_environ

LINES: tuple[LineName, ...] = ("1.2.x", "newest")
DEADLINE_S = 60.0
SETTINGS: dict[str, Any] = {
    "max_batch_size": 8,
    "context_tokens": 2048,
    "stop_timeout_s": 1.0,
    "kv_cache": {"event_interval_s": 0.02},
}


def request(name: str, max_tokens: int = 8, first: int = 10, **sampling: Any) -> GenerateRequest:
    params = SamplingParams(max_tokens=max_tokens, **{"temperature": 0.0, **sampling})
    return GenerateRequest(name, "m", pack_tokens(range(first, first + 40)), params)


async def run(engine: HostedTrtllm, asked: GenerateRequest) -> list[TokenDelta]:
    async with asyncio.timeout(DEADLINE_S):
        return [delta async for delta in engine.generate(asked)]


def tokens_of(deltas: list[TokenDelta]) -> tuple[int, ...]:
    return tuple(token for delta in deltas for token in delta.token_ids)


@asynccontextmanager
async def started(line: LineName, settings: dict[str, Any] | None = None, **more: Any) -> AsyncIterator[HostedTrtllm]:
    engine = HostedTrtllm(line, {**SETTINGS, **(settings or {})}, **more)
    try:
        await engine.start()
        yield engine
    finally:
        await engine.stop()


async def until(condition: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():  # noqa: ASYNC110  # nobody announces it
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"not {what}") from None


def is_dead(engine: HostedTrtllm) -> bool:
    try:
        engine.check_health()
    except EngineDead:
        return True
    return False


@pytest.mark.parametrize("line", LINES)
async def test_trap_2_5_a_fatal_text_in_one_requests_error_ends_the_engine(line: LineName) -> None:
    async with started(line) as engine:
        other = asyncio.ensure_future(run(engine, request("other", 1500, first=300)))
        await until(lambda: engine.stats().generated_tokens > 0, "generating")
        engine.fault("request_error", "CUDA error: an illegal memory access was encountered")
        with pytest.raises(EngineDead):
            await other
        await until(lambda: is_dead(engine), "dead")


@pytest.mark.parametrize("line", LINES)
async def test_trap_2_5_out_of_memory_is_one_requests_error(line: LineName) -> None:
    async with started(line) as engine:
        engine.fault("request_error", "CUDA out of memory. Tried to allocate 2.00 GiB")
        with pytest.raises(RequestError, match="out of GPU memory"):
            await run(engine, request("unlucky"))
        assert len(tokens_of(await run(engine, request("next")))) == 8
        engine.check_health()


@pytest.mark.parametrize("line", LINES)
async def test_trap_7_3_19_a_shutdown_that_blocks_is_bounded(line: LineName) -> None:
    async with started(line) as engine:
        engine.fault("block_shutdown")
        async with asyncio.timeout(DEADLINE_S):
            await engine.stop()
        assert engine.process is not None
        assert engine.process.returncode is not None


async def test_trap_2_5_a_worker_that_fails_to_start_says_why() -> None:
    engine = HostedTrtllm("newest", SETTINGS)
    engine.fault("fail_start", "no kernel image is available")
    with pytest.raises(EngineDead, match="no kernel image"):
        await engine.start()
    await engine.stop()


async def test_trap_1_2_a_keyword_that_does_not_exist_is_refused_at_the_start() -> None:
    engine = HostedTrtllm("1.2.x", {**SETTINGS, "extra": {"no_such_keyword": 1}})
    with pytest.raises(ConfigError, match="no_such_keyword"):
        await engine.start()
    await engine.stop()


async def test_trap_7_3_21_a_kv_cache_that_came_out_too_small_fails_the_start() -> None:
    cache = {"max_tokens": 4096, "min_tokens": 4096}
    async with started("newest", {"kv_cache": cache}):
        pass
    environ = {"TRTLLM_DOUBLE_KV_TOKENS": "2048"}
    engine = HostedTrtllm("newest", {**SETTINGS, "kv_cache": {"min_tokens": 4096}}, environ=environ)
    with pytest.raises(ConfigError, match=r"kv_cache\.min_tokens: 4096"):
        await engine.start()
    await engine.stop()


async def test_trap_2_7_events_that_the_ring_buffer_dropped_leave_no_wrong_index() -> None:
    cache = {"event_interval_s": 0.3, "event_buffer": 4}
    async with started("newest", {"kv_cache": cache}) as engine:
        for i in range(12):
            await run(engine, request(f"r{i}", 2, first=40 * i))
        await asyncio.sleep(0)
        async with asyncio.timeout(DEADLINE_S):
            while True:
                told, there = set(engine.ask("told")), set(engine.ask("content"))
                assert told <= there
                if told:
                    break
                await run(engine, request("again", 2, first=1000))


@pytest.mark.parametrize("line", LINES)
async def test_without_block_reuse_there_are_no_events_and_the_cache_has_a_size_all_the_same(line: LineName) -> None:
    async with started(line, {"kv_cache": {"block_reuse": False}}) as engine:
        for name in "ab":
            (first, *_) = await run(engine, request(name))
            assert first.prefill is not None
            assert first.prefill.cached_tokens == 0
        assert engine.info.total_blocks > 100
        assert engine.ask("told") == []


@pytest.mark.parametrize("line", LINES)
async def test_workers_in_processes_of_their_own_generate_the_same(line: LineName) -> None:
    async with started(line) as engine:
        expected = tokens_of(await run(engine, request("r", logprobs=1)))
    async with started(line, kind="mpi", layout={"tensor": 2}) as engine:
        assert len(engine.ranks()) >= 2
        deltas = await run(engine, request("r", logprobs=1))
        assert tokens_of(deltas) == expected
        assert deltas[-1].finish_reason is FinishReason.LENGTH
        await until(lambda: len(engine.ask("told")) == 1, "told by events")


async def test_trap_2_5_the_newest_line_tells_of_a_killed_worker() -> None:
    async with started("newest", kind="mpi", layout={"tensor": 2}) as engine:
        stream = engine.generate(request("r", 1500))
        await anext(stream)
        engine.ranks()[-1].send_signal(signal.SIGKILL)
        async with asyncio.timeout(DEADLINE_S):
            with pytest.raises(EngineDead):
                async for _ in stream:
                    pass
        assert is_dead(engine)


async def test_trap_7_3_16_the_1_2_line_hangs_with_a_killed_worker_and_can_still_be_stopped() -> None:
    async with started("1.2.x", kind="mpi", layout={"tensor": 2}) as engine:
        stream = engine.generate(request("r", 1500))
        await anext(stream)
        engine.ranks()[-1].send_signal(signal.SIGKILL)
        reading = asyncio.ensure_future(_drain(stream))
        before = -1
        while engine.stats().generated_tokens != before:  # what was under way still arrives
            before = engine.stats().generated_tokens
            await asyncio.sleep(0.5)
        engine.check_health()  # the library says that it is well: the watchdog of the worker group is there for that
        assert not reading.done()
        async with asyncio.timeout(DEADLINE_S):
            await engine.stop()
            with pytest.raises(EngineDead):
                await reading


async def _drain(stream: Any) -> None:
    async for _ in stream:
        pass


@pytest.mark.parametrize("keeps_logits", [False, True])
async def test_an_engine_directory_is_served_by_the_tensorrt_backend(tmp_path: Path, keeps_logits: bool) -> None:
    code = """
import sys
from tensorrt_llm._tensorrt_engine import LLM
from tensorrt_llm.llmapi import BuildConfig
kept = {"gather_context_logits": True, "gather_generation_logits": True} if sys.argv[3] == "True" else {}
llm = LLM(model=sys.argv[1], build_config=BuildConfig(max_batch_size=8, max_seq_len=512, **kept))
llm.save(sys.argv[2])
llm.shutdown()
"""
    environ = double_environ("1.2.x", {**os.environ, "TLLM_WORKER_USE_SINGLE_PROCESS": "1"})
    arguments = [sys.executable, "-c", code, str(QUICKSTART), str(tmp_path / "engine"), str(keeps_logits)]
    await asyncio.to_thread(subprocess.run, arguments, env=environ, check=True, timeout=60)
    settings = {"context_tokens": None, "max_batch_size": None}
    async with started("1.2.x", settings, model_dir=tmp_path / "engine") as engine:
        assert "tensorrt" in engine.info.engine
        assert engine.info.context_tokens == 512
        assert len(tokens_of(await run(engine, request("r")))) == 8
        scored = request("l", logprobs=1, prompt_logprobs=1)
        if keeps_logits:
            deltas = await run(engine, scored)
            assert deltas[0].prefill is not None
            assert len(deltas[0].prefill.prompt_logprobs or ()) == 40
            assert all(delta.logprobs is not None for delta in deltas if delta.token_ids)
        else:
            with pytest.raises(RequestError, match=r"build\.logprobs"):
                await run(engine, scored)
