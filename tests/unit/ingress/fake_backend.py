"""FakeBackend: a backend that says what a script says."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from serve.core.request import FinishReason, GenerateRequest, PrefillInfo, TokenDelta, TokenLogprob
from serve.ingress.backend import ModelReadiness
from serve.ingress.routing_desk import RoutingDesk
from serve.router.hints import NO_HINTS, RouteHints

Script = Callable[[GenerateRequest], AsyncGenerator[TokenDelta, None]]


def logprobs_of(token_ids: Sequence[int], top: int) -> tuple[TokenLogprob, ...]:
    """Return made-up log probabilities that say which token they belong to."""
    return tuple(
        TokenLogprob(token, -token / 1000, tuple((token + rank, -(token + rank) / 1000) for rank in range(top)))
        for token in token_ids
    )


def say(
    token_ids: Sequence[int],
    *,
    per_delta: int = 1,
    finish: FinishReason = FinishReason.STOP,
    cached_tokens: int = 0,
    fallback: str = "",
    bundle: str = "",
) -> Script:
    """Return a script that emits tokens, `per_delta` at a time, up to `max_tokens`; the finish comes with the last."""

    async def script(request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        sampling = request.sampling
        ids = list(token_ids[: sampling.max_tokens])
        cut = len(ids) < len(token_ids) or sampling.max_tokens == 0
        prompt = request.prompt_array().tolist()
        scored = None
        if sampling.prompt_logprobs is not None:
            scored = (None, *logprobs_of(prompt[1:], sampling.prompt_logprobs))
        prefill: PrefillInfo | None = PrefillInfo(cached_tokens, 0.25, 0.5, scored, fallback, bundle)
        groups = [ids[start : start + per_delta] for start in range(0, len(ids), per_delta)] or [[]]
        for number, group in enumerate(groups):
            await asyncio.sleep(0)
            last = number == len(groups) - 1
            yield TokenDelta(
                token_ids=tuple(group),
                finish_reason=(FinishReason.LENGTH if cut else finish) if last else None,
                stop_token_id=2 if last and not cut and finish is FinishReason.STOP else None,
                logprobs=None if sampling.logprobs is None else logprobs_of(group, sampling.logprobs),
                prefill=prefill,
                emitted_s=1000.0 + number,
            )
            prefill = None

    return script


def fail(error: Exception, after: Sequence[int] = ()) -> Script:
    """Return a script that emits tokens one by one and then raises."""

    async def script(request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        for number, token in enumerate(after):
            yield TokenDelta((token,), prefill=PrefillInfo() if number == 0 else None)
            await asyncio.sleep(0)
        raise error

    return script


def say_for_ever(token_id: int) -> Script:
    """Return a script that repeats a token until it is closed."""

    async def script(request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        yield TokenDelta((token_id,), prefill=PrefillInfo())
        while True:
            await asyncio.sleep(0)
            yield TokenDelta((token_id,))

    return script


def silent() -> Script:
    """Return a script that never says anything."""

    async def script(request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        await asyncio.get_running_loop().create_future()
        yield TokenDelta()

    return script


@dataclass
class FakeBackend:
    """Runs a script for each sequence; a list of scripts is used up in turn.

    Attributes:
        script: What to say.
        ready: Ready replicas by model.
        requests: What was asked, in order.
        running: Sequences that are neither finished nor closed.
        cancelled: Ids of those that were closed before their end.
        served_by_fallback: What `fallbacks` says.
        desk: Hears of every sequence. A sequence of a model that has a board goes to the board's first choice.
    """

    script: Script | list[Script]
    ready: dict[str, int] = field(default_factory=lambda: {"tiny": 1, "org/tiny-2": 2})
    requests: list[GenerateRequest] = field(default_factory=list)
    running: int = 0
    cancelled: list[str] = field(default_factory=list)
    served_by_fallback: dict[str, str] = field(default_factory=dict)
    desk: RoutingDesk = field(default_factory=lambda: RoutingDesk({}))

    async def generate(
        self, request: GenerateRequest, hints: RouteHints = NO_HINTS
    ) -> AsyncGenerator[TokenDelta, None]:
        """See `Backend.generate`."""
        with self.desk.following(request, hints) as following:
            await following.admitted()
            replica_id = self._route(request)
            async with aclosing(self._run(request)) as deltas:
                async for delta in deltas:
                    following.note(delta, replica_id)
                    yield delta

    def _route(self, request: GenerateRequest) -> str:
        board = self.desk.boards.get(request.model)
        choice = board.choose(request) if board is not None else None
        if board is None or choice is None:
            return "only"
        board.accepted(request.request_id, choice.best[0])
        return choice.best[0]

    async def _run(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        script = self.script.pop(0) if isinstance(self.script, list) else self.script
        self.requests.append(request)
        self.running += 1
        stream = script(request)
        try:
            async for delta in stream:
                yield delta
        except (GeneratorExit, asyncio.CancelledError):
            self.cancelled.append(request.request_id)
            raise
        finally:
            self.running -= 1
            await stream.aclose()

    def fallbacks(self) -> dict[str, str]:
        """See `Backend.fallbacks`."""
        return self.served_by_fallback

    async def readiness(self) -> list[ModelReadiness]:
        """See `Backend.readiness`."""
        return [ModelReadiness(model, ready, max(ready, 1)) for model, ready in self.ready.items()]
