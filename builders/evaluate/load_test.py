"""A load test of a started engine: closed load at several concurrencies. Nothing but the engine is in the way."""

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from statistics import median

from builders.evaluate.ladder import Ladder, next_concurrency
from builders.evaluate.load_point import Goal, LoadTrace, summarize
from builders.evaluate.load_shape import LoadRequest, LoadShape, LoadSource
from builders.evaluate.out_of_memory import says_out_of_memory
from builders.evaluate.together import together
from serve.artifacts.certificates import LoadPoint
from serve.core.request import GenerateRequest, SamplingParams, pack_tokens
from serve.engines.protocol import Engine
from serve.errors import Overloaded

_WARM_UP = 2  # requests before anything is measured, one after the other
_RAMP_SHARE = 0.5  # of the test's time, at most, until all streams run
_GRACE_S = 10.0  # however short a test is, its requests may take so long
_REQUESTS, _LONGER = 2.0, 3.0  # requests of a stream that a test should see, and how much longer it may take for them
_ids = itertools.count()


@dataclass(frozen=True)
class LoadPlan:
    """A load test.

    Attributes:
        shape: Of the requests.
        goal: What they have to meet.
        ladder: At which concurrencies.
        point_s: How long each is measured; longer, within reason, where requests take longer.
        seed: Of the requests.
    """

    shape: LoadShape
    goal: Goal
    ladder: Ladder
    point_s: float
    seed: int

    def window_s(self, request_s: float) -> float:
        """Return how long a load is measured of which a request takes so long: not only the beginning of some."""
        return min(max(self.point_s, _REQUESTS * request_s), _LONGER * self.point_s)

    @property
    def grace_s(self) -> float:
        """How long requests are waited for after that: until the slowest of them has missed the goal, within reason."""
        missed_s = self.goal.ttft_s + self.goal.tpot_s * self.shape.longest
        return min(missed_s, max(_GRACE_S, 2.0 * self.point_s))


async def load_test(
    engine: Engine,
    plan: LoadPlan,
    ring: Sequence[int],
    tell: Callable[[Sequence[LoadPoint]], None] | None = None,
) -> tuple[LoadPoint, ...]:
    """Measure an engine.

    Args:
        engine: Started.
        plan: What to offer.
        ring: Token ids of texts, for the prompts.
        tell: Told after each point.

    Returns:
        One point for each concurrency, in the order of measuring.

    Raises:
        ConfigError, RequestError: The requests do not fit the engine.
        Overloaded: The engine ran out of memory.
        EngineDead: The engine died.
    """
    info = engine.info
    room = min(info.context_tokens, info.total_blocks * info.tokens_per_block)
    source = LoadSource(plan.shape, ring, room, plan.seed)
    # Both its kernels and its caches are cold in the first.
    duration_s = [await _timed(engine, source) for _ in range(_WARM_UP)][-1]
    points: list[LoadPoint] = []
    while (concurrency := next_concurrency(points, plan.ladder, plan.goal)) is not None:
        point, duration_s = await _offer(engine, source, concurrency, plan, duration_s)
        points.append(point)
        if tell is not None:
            tell(points)
    return tuple(points)


async def _timed(engine: Engine, source: LoadSource) -> float:
    trace = await _send(engine, source.draw())
    return trace.ended_s - trace.started_s


async def _offer(
    engine: Engine, source: LoadSource, concurrency: int, plan: LoadPlan, request_s: float
) -> tuple[LoadPoint, float]:
    """Offer so many streams; returns the figures, and how long a request took."""
    window_s = plan.window_s(request_s)
    ramp_s = min(request_s, _RAMP_SHARE * window_s) if concurrency > 1 else 0.0
    begin_s = time.monotonic() + ramp_s
    end_s = begin_s + window_s
    traces: list[LoadTrace] = []

    async def stream(index: int) -> None:
        await asyncio.sleep(ramp_s * index / concurrency)
        while time.monotonic() < end_s:
            traces.append(await _send(engine, source.draw(), give_up_s=end_s + plan.grace_s))

    await together(stream(index) for index in range(concurrency))
    durations = [trace.ended_s - trace.started_s for trace in traces]
    return summarize(traces, begin_s, end_s, concurrency, plan.goal), median(durations)


async def _send(engine: Engine, drawn: LoadRequest, give_up_s: float | None = None) -> LoadTrace:
    """Send one request, and note when its tokens come; it has failed if the engine is full, or takes too long."""
    name = f"load-{next(_ids)}"
    # No stop tokens: so many tokens are generated, whatever they are. No request shares another one's cache.
    sampling = SamplingParams(temperature=0.0, max_tokens=drawn.output_tokens)
    request = GenerateRequest(name, "candidate", pack_tokens(drawn.prompt), sampling, cache_salt=name)
    started_s = time.monotonic()
    times: list[tuple[float, int]] = []
    finished = False
    try:
        async with (
            asyncio.timeout(None if give_up_s is None else give_up_s - started_s),
            aclosing(engine.generate(request)) as deltas,
        ):
            async for delta in deltas:
                if delta.token_ids:
                    times.append((time.monotonic(), len(delta.token_ids)))
                finished = delta.finish_reason is not None
    except TimeoutError:
        finished = False
    except Overloaded as exc:
        if says_out_of_memory(str(exc)):
            raise  # an engine that survives that serves nobody well
        await asyncio.sleep(exc.retry_after_s)  # a stream that asked again at once would only keep the engine busy
    ended_s = times[-1][0] if finished and times else time.monotonic()
    return LoadTrace(started_s, tuple(times), ended_s, finished)
