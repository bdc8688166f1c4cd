"""The live engine beyond the port: time, faults, and how it fails."""

import asyncio
import subprocess
import sys
import time
from contextlib import aclosing
from typing import Any

import pytest

from serve.core.request import GenerateRequest, SamplingParams, TokenDelta, pack_tokens
from serve.engines.simulated.engine import SimulatedEngine
from serve.engines.simulated.faults import Fault
from serve.engines.simulated.settings import FixedLatencySettings, SimulatedSettings
from serve.errors import ContextTooLong, EngineDead, RequestError


def engine_of(**settings: Any) -> SimulatedEngine:
    given = {"vocab_size": 500, "latency": FixedLatencySettings(decode_step_s=1e-3), "context_tokens": 2000, **settings}
    return SimulatedEngine(SimulatedSettings(**given))


def request_of(name: str = "r", tokens: int = 20, prompt_tokens: int = 8, **sampling: Any) -> GenerateRequest:
    prompt = pack_tokens((len(name) + i) % 500 for i in range(prompt_tokens))
    return GenerateRequest(name, "m", prompt, SamplingParams(**{"temperature": 0.0, "max_tokens": tokens, **sampling}))


async def read(engine: SimulatedEngine, request: GenerateRequest) -> list[TokenDelta]:
    async with asyncio.timeout(20), aclosing(engine.generate(request)) as deltas:
        return [delta async for delta in deltas]


def count(deltas: list[TokenDelta]) -> int:
    return sum(len(delta.token_ids) for delta in deltas)


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  # an engine announces nothing
            await asyncio.sleep(0.001)


async def test_steps_never_end_early_and_delays_do_not_add_up() -> None:
    engine = engine_of(latency=FixedLatencySettings(decode_step_s=0.004))
    await engine.start()
    start_s = time.monotonic()

    async def disturb() -> None:
        for _ in range(10):
            await asyncio.sleep(0.02)
            time.sleep(0.006)  # noqa: ASYNC251  # holds the loop, as other work would

    deltas, _ = await asyncio.gather(read(engine, request_of(tokens=100)), disturb())
    emitted = [delta.emitted_s - start_s for delta in deltas]
    # The n-th step cannot end before its time; had delays added up, 60 ms would be missing at the end.
    assert all(at_s >= 0.004 * i - 0.003 for i, at_s in enumerate(emitted))
    assert emitted[0] + 0.004 * 98 <= emitted[-1]
    await engine.stop()


async def test_all_streams_get_a_steps_tokens_at_once() -> None:
    engine = engine_of(latency=FixedLatencySettings(decode_step_s=0.005))
    await engine.start()
    streams = await asyncio.gather(*(read(engine, request_of("x" * i, 30)) for i in range(1, 9)))
    moments = {delta.emitted_s for deltas in streams for delta in deltas}
    assert len(moments) <= 32
    await engine.stop()


async def test_as_fast_as_possible_leaves_the_loop_to_others_and_merges_for_slow_readers() -> None:
    engine = engine_of(speed=0)
    await engine.start()
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0)
            ticks += 1

    ticker = asyncio.create_task(tick())
    slow: list[TokenDelta] = []
    async with aclosing(engine.generate(request_of(tokens=1500))) as deltas:
        async for delta in deltas:
            slow.append(delta)
            for _ in range(50):
                await asyncio.sleep(0)
    ticker.cancel()
    assert count(slow) == 1500
    assert len(slow) < 100
    assert ticks > 1500
    await engine.stop()


async def test_speed_scales_time() -> None:
    slow, fast = engine_of(speed=1), engine_of(speed=100)
    await asyncio.gather(slow.start(), fast.start())
    await asyncio.gather(read(slow, request_of()), read(fast, request_of()))
    assert slow.stats().step_s == pytest.approx(1e-3)
    assert fast.stats().step_s == pytest.approx(1e-5)
    assert slow.stats().steps == fast.stats().steps > 1
    assert slow.stats().busy_s == pytest.approx(100 * fast.stats().busy_s)
    await asyncio.gather(slow.stop(), fast.stop())


async def test_queue_and_prefill_times_are_told() -> None:
    engine = engine_of(latency=FixedLatencySettings(prefill_tokens_per_s=1000, decode_step_s=1e-3), max_batch_size=1)
    await engine.start()
    first, second = await asyncio.gather(read(engine, request_of("a", 10)), read(engine, request_of("bb", 10)))
    assert first[0].prefill is not None
    assert second[0].prefill is not None
    assert first[0].prefill.prefill_s == pytest.approx(0.008)  # as planned: deadlines are absolute
    assert second[0].prefill.queue_s > 0.008 + 0.008  # the first one's prompt, and nine steps
    await engine.stop()


async def test_death_after_so_many_tokens() -> None:
    engine = engine_of(faults=[Fault(kind="die", after_tokens=30)])
    await engine.start()
    assert count(await read(engine, request_of(tokens=20))) == 20
    with pytest.raises(EngineDead, match="a rank was lost"):
        await read(engine, request_of("b", 20))
    with pytest.raises(EngineDead):
        engine.check_health()
    assert engine.stats().generated_tokens == 30
    await engine.stop()


async def test_death_at_a_time_while_nothing_runs() -> None:
    engine = engine_of(faults=[Fault(kind="die", at_s=0.02)])
    await engine.start()
    engine.check_health()

    def dead() -> bool:
        try:
            engine.check_health()
        except EngineDead:
            return True
        return False

    await until(dead)


async def test_a_hanging_engine_says_that_it_is_healthy_and_can_recover() -> None:
    engine = engine_of(faults=[Fault(kind="hang", after_tokens=5, for_s=0.05)])
    await engine.start()
    reader = asyncio.create_task(read(engine, request_of(tokens=20)))
    await until(lambda: engine.stats().generated_tokens >= 5)
    hung_s = time.monotonic()
    engine.check_health()
    other = asyncio.create_task(read(engine, request_of("late", 5)))
    deltas = await reader
    assert count(deltas) == 20
    assert count(await other) == 5
    assert deltas[-1].emitted_s >= hung_s + 0.04
    await engine.stop()


async def test_a_hang_for_good_ends_with_stop() -> None:
    engine = engine_of()
    await engine.start()
    reader = asyncio.create_task(read(engine, request_of(tokens=500)))
    await until(lambda: engine.stats().generated_tokens > 3)
    engine.inject(Fault(kind="hang"))
    tokens = engine.stats().generated_tokens
    await asyncio.sleep(0.02)
    assert engine.stats().generated_tokens == tokens
    await engine.stop()
    with pytest.raises(EngineDead, match="was stopped"):
        await reader


async def test_a_slow_engine_takes_its_factor() -> None:
    engine = engine_of(faults=[Fault(kind="slow", after_tokens=5, factor=7, for_s=60)])
    await engine.start()
    await read(engine, request_of(tokens=10))
    assert engine.stats().step_s == pytest.approx(7e-3)
    await engine.stop()


async def test_a_start_that_fails_can_be_repeated() -> None:
    engine = engine_of(faults=[Fault(kind="fail_start", times=2)])
    for _ in range(2):
        with pytest.raises(EngineDead, match="does not start"):
            await engine.start()
        with pytest.raises(EngineDead, match="has not been started"):
            await read(engine, request_of())
    await engine.start()
    assert count(await read(engine, request_of())) == 20
    await engine.stop()


async def test_one_request_is_refused() -> None:
    engine = engine_of(faults=[Fault(kind="error_request", after_requests=1)])
    await engine.start()
    assert count(await read(engine, request_of("a", 3))) == 3
    with pytest.raises(RequestError) as raised:
        await read(engine, request_of("b", 3))
    assert raised.value.code == "simulated_fault"
    assert count(await read(engine, request_of("c", 3))) == 3
    await engine.stop()


def test_exit_ends_the_process_at_once() -> None:
    script = (
        "import asyncio\n"
        "from serve.engines.simulated.engine import SimulatedEngine\n"
        "from serve.engines.simulated.faults import Fault\n"
        "from serve.engines.simulated.settings import SimulatedSettings\n"
        "engine = SimulatedEngine(SimulatedSettings(faults=[Fault(kind='exit', at_s=0.01, exit_code=17)]))\n"
        "async def main():\n"
        "    await engine.start()\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 17


async def test_the_first_reason_of_death_is_kept() -> None:
    engine = engine_of()
    await engine.start()
    engine.inject(Fault(kind="die"))
    await engine.stop()
    with pytest.raises(EngineDead, match="a rank was lost"):
        engine.check_health()


async def test_without_chunks_a_prompt_has_to_fit_one_step() -> None:
    engine = engine_of(chunked_prefill=False, max_num_tokens=300)
    await engine.start()
    with pytest.raises(ContextTooLong, match="300"):
        await read(engine, request_of(prompt_tokens=301))
    await read(engine, request_of(prompt_tokens=300))
    await engine.stop()


async def test_stops_come_with_the_configured_hazard() -> None:
    engine = engine_of(speed=0, stop_hazard=0.2)
    await engine.start()
    ended = [await read(engine, request_of("x" * i, 200, stop_token_ids=(499,))) for i in range(1, 20)]
    assert all(deltas[-1].stop_token_id == 499 for deltas in ended)
    assert count(await read(engine, request_of("free", 200))) == 200
    await engine.stop()
