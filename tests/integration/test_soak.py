"""200 streams for 20 seconds, or RAYTRT_SOAK_S: every token arrives, once, in order; memory and sockets do not grow."""

import asyncio
import json
import os
import random
import time
from collections.abc import AsyncIterator

import httpx
import psutil
from tokenizers import Tokenizer

from serve.config import BUILTIN_MODELS
from serve.core.request import GenerateRequest, SamplingParams, pack_tokens
from serve.engines.factory import make_engine
from serve.engines.simulated.settings import SimulatedSettings
from tests.integration.serving import Serving

STREAMS = 200
DURATION_S = float(os.environ.get("RAYTRT_SOAK_S", "20"))
MAX_TOKENS = 150
QUICKSTART = BUILTIN_MODELS / "quickstart"


async def expected_tokens(prompts: list[list[int]]) -> list[list[int]]:
    """Return what a simulated engine of the same seed generates for each prompt."""
    settings = SimulatedSettings.model_validate({"speed": 0})
    engine = make_engine(settings, QUICKSTART)
    await engine.start()

    async def run(number: int, prompt: list[int]) -> list[int]:
        sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
        request = GenerateRequest(f"expected-{number}", "slow", pack_tokens(prompt), sampling)
        return [token async for delta in engine.generate(request) for token in delta.token_ids]

    tokens = await asyncio.gather(*[run(number, prompt) for number, prompt in enumerate(prompts)])
    await engine.stop()
    return tokens


async def text_of(response: httpx.Response) -> AsyncIterator[str]:
    last = ""
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            choices = json.loads(line.removeprefix("data: "))["choices"]
            if choices:
                yield choices[0]["text"]
        last = line or last
    assert last == "data: [DONE]"


async def test_200_streams_lose_nothing_and_leak_nothing(serving: Serving) -> None:
    prompts = [[300 + number, *range(300, 340)] for number in range(STREAMS)]
    tokens = await expected_tokens(prompts)
    tokenizer = Tokenizer.from_file(str(QUICKSTART / "tokenizer.json"))
    deadline_s = time.monotonic() + DURATION_S
    limits = httpx.Limits(max_connections=STREAMS, max_keepalive_connections=STREAMS)
    watched = watched_processes(serving)
    async with httpx.AsyncClient(base_url=serving.url, timeout=60, limits=limits) as client:

        async def keep_streaming(number: int) -> int:
            draw, finished = random.Random(number), 0
            while time.monotonic() < deadline_s:
                count = draw.randint(50, MAX_TOKENS)
                body = {"model": "slow", "prompt": prompts[number], "max_tokens": count, "temperature": 0}
                async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
                    assert response.status_code == 200
                    text = "".join([piece async for piece in text_of(response)])
                assert text == tokenizer.decode(tokens[number][:count]), f"stream {number}, {count} tokens"
                finished += 1
            return finished

        async with asyncio.TaskGroup() as group:
            streams = [group.create_task(keep_streaming(number)) for number in range(STREAMS)]
            await asyncio.sleep(DURATION_S / 3)  # not a wait for anything: the first third is for warming up
            early = resources(watched)
        late = resources(watched)
    assert all(stream.result() >= 2 for stream in streams)
    for name, (rss_bytes, sockets) in late.items():
        assert rss_bytes < early[name][0] * 1.1 + 2**25, f"{name} grew from {early[name][0]} to {rss_bytes} bytes"
        assert sockets <= early[name][1] + 8, f"{name} grew from {early[name][1]} to {sockets} sockets"


def watched_processes(serving: Serving) -> dict[str, psutil.Process]:
    pids = {"gateway": serving.replica_pids("gateway")[0], "replica": serving.replica_pids("model-slow")[0]}
    return {name: psutil.Process(pid) for name, pid in pids.items()}


def resources(processes: dict[str, psutil.Process]) -> dict[str, tuple[int, int]]:
    """Return resident bytes and open sockets of each process."""
    return {
        name: (process.memory_info().rss, len(process.net_connections(kind="all")))
        for name, process in processes.items()
    }
