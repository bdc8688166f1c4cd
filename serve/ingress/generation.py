"""Generation: sends the sequences of a request to the backend and their text to the client."""

import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from functools import partial

from serve.core.request import PrefillInfo
from serve.errors import EngineDead
from serve.ingress.answer import Answer, Result
from serve.ingress.api_error import ApiError
from serve.ingress.backend import Backend
from serve.ingress.disconnect import cancel_on_disconnect
from serve.ingress.exchange import Exchange
from serve.ingress.fan_in import fan_in
from serve.ingress.job import Choice, Job
from serve.ingress.metrics import ModelMetrics
from serve.ingress.sequence import Piece, SequenceText
from serve.ingress.settings import GatewaySettings
from serve.ingress.text_work import TextWork

_CHARS_PER_LOGPROB = 16  # writing the log probability of a token costs about as much as tokenizing so many characters

_Pieces = AsyncGenerator[tuple[int, Piece], None]


class Generation:
    """Runs the jobs of one gateway process. One event loop uses it."""

    def __init__(self, backend: Backend, work: TextWork) -> None:
        """Start with nothing in flight."""
        self._backend = backend
        self._work = work
        self._in_flight = 0

    @contextmanager
    def admitted(self, sequences: int, settings: GatewaySettings) -> Iterator[None]:
        """Count sequences as in flight.

        Raises:
            ApiError: There would be more than `max_in_flight`.
        """
        if self._in_flight + sequences > settings.max_in_flight:
            raise ApiError(
                429,
                f"This gateway holds {self._in_flight} sequences and takes {settings.max_in_flight}; "
                f"the request has {sequences}. Try again later.",
                code="too_many_requests",
                retry_after_s=settings.retry_after_s,
            )
        self._in_flight += sequences
        try:
            yield
        finally:
            self._in_flight -= sequences

    async def run(self, exchange: Exchange, job: Job, answer: Answer, metrics: ModelMetrics, *, stream: bool) -> None:
        """Generate, and send the answer. A client that goes away cancels all sequences.

        Raises:
            ClientGone: It did.
            RequestError, Overloaded, EngineDead: As the backend; the other sequences have been cancelled.
        """
        pieces = fan_in([self._pieces(choice, exchange, metrics) for choice in job.choices], merge_pieces)
        async with cancel_on_disconnect(exchange.receive) as watch, aclosing(pieces):
            await (self._stream if stream else self._collect)(exchange, job, answer, pieces, watch)
        usage = job.usage()
        metrics.prompt_tokens += usage.prompt_tokens
        metrics.cached_tokens += usage.prompt_tokens_details.cached_tokens

    async def _collect(
        self, exchange: Exchange, job: Job, answer: Answer, pieces: _Pieces, watch: cancel_on_disconnect
    ) -> None:
        results, running = [Result() for _ in job.choices], len(job.choices)
        async for number, piece in pieces:
            results[number].add(piece)
            if piece.finish_reason is not None:
                running -= 1
                if not running:
                    entries = sum(len(result.tokens) for result in results) + _echoed_tokens(job, job.choices)
                    body = await self._work.run(entries * _CHARS_PER_LOGPROB, partial(answer.whole, results))
                    watch.stop()
                    await exchange.send_json(body)

    async def _stream(
        self, exchange: Exchange, job: Job, answer: Answer, pieces: _Pieces, watch: cancel_on_disconnect
    ) -> None:
        running, silent = len(job.choices), {choice.index for choice in job.choices}
        async for number, piece in pieces:
            choice = job.choices[number]
            if job.echo and number in silent:
                silent.remove(number)
                chars = _echoed_tokens(job, [choice]) * _CHARS_PER_LOGPROB
                event = await self._work.run(chars, partial(answer.event, choice, piece))
            else:
                event = answer.event(choice, piece)
            if not exchange.status:  # only now: until something is there, a refusal can still have its own status
                await exchange.start_events()
            if piece.finish_reason is not None:
                running -= 1
                if not running:
                    watch.stop()
                    await exchange.end_events(event + answer.end())
                    continue
            if event:
                await exchange.send_events(event)

    async def _pieces(self, choice: Choice, exchange: Exchange, metrics: ModelMetrics) -> AsyncGenerator[Piece, None]:
        """Generate one sequence, until the engine or a stop string ends it."""
        text, clock = choice.text, _SequenceClock(metrics, exchange.started_s)
        try:
            async with aclosing(self._backend.generate(choice.request)) as deltas:
                async for delta in deltas:
                    if delta.prefill is not None:
                        choice.prefill = delta.prefill
                        clock.saw_prefill(delta.prefill)
                    piece = text.feed(delta)
                    clock.saw_tokens(piece.num_tokens)
                    yield piece
                    # The engine's own end is waited for; closing the generator would cancel what is complete.
                    if piece.finish_reason is not None and delta.finish_reason is None:
                        break
            if text.finish_reason is None:
                raise EngineDead("the sequence ended without a finish reason")
        finally:
            clock.close(text)


class _SequenceClock:
    """Measures one sequence."""

    __slots__ = ("_first_s", "_last_s", "_metrics", "_started_s")

    def __init__(self, metrics: ModelMetrics, started_s: float) -> None:
        self._metrics = metrics
        self._started_s = started_s
        self._first_s = self._last_s = 0.0
        metrics.in_flight += 1
        metrics.waiting += 1

    def saw_prefill(self, prefill: PrefillInfo) -> None:
        self._metrics.queue.observe(prefill.queue_s)
        self._metrics.prefill.observe(prefill.prefill_s)

    def saw_tokens(self, count: int) -> None:
        if not count:
            return
        now_s = time.monotonic()
        if self._first_s:
            self._metrics.itl.observe((now_s - self._last_s) / count, count)
        else:
            self._first_s = now_s
            self._metrics.waiting -= 1
            self._metrics.ttft.observe(now_s - self._started_s)
        self._last_s = now_s

    def close(self, text: SequenceText) -> None:
        metrics, tokens = self._metrics, text.completion_tokens
        metrics.in_flight -= 1
        metrics.waiting -= 0 if self._first_s else 1
        metrics.completion_tokens += tokens
        if text.finish_reason is None or not self._first_s:
            return
        metrics.e2e.observe(self._last_s - self._started_s)
        if tokens > 1:
            metrics.tpot.observe((self._last_s - self._first_s) / (tokens - 1))


def _echoed_tokens(job: Job, choices: Sequence[Choice]) -> int:
    return sum(choice.request.prompt_tokens for choice in choices) if job.echo else 0


def merge_pieces(first: Piece, second: Piece) -> Piece:
    """Join two consecutive pieces of one sequence."""
    return Piece(
        text=first.text + second.text,
        tokens=[*first.tokens, *second.tokens],
        finish_reason=second.finish_reason,
        num_tokens=first.num_tokens + second.num_tokens,
        emitted_s=first.emitted_s,
    )
