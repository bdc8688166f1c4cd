"""Generation: sends the sequences of a request to the backend and their text to the client."""

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from functools import partial

from serve.errors import EngineDead
from serve.ingress.answer import Answer, Result
from serve.ingress.api_error import ApiError
from serve.ingress.backend import Backend
from serve.ingress.disconnect import cancel_on_disconnect
from serve.ingress.exchange import Exchange
from serve.ingress.fan_in import fan_in
from serve.ingress.job import Choice, Job
from serve.ingress.metrics import ModelMetrics
from serve.ingress.sequence import Piece, merge_pieces
from serve.ingress.sequence_clock import SequenceClock
from serve.ingress.settings import GatewaySettings
from serve.ingress.text_work import TextWork
from serve.router.records import RouteRecord

_CHARS_PER_LOGPROB = 16  # writing the log probability of a token costs about as much as tokenizing so many characters

_Said = tuple[Choice, Piece]
_Pieces = AsyncGenerator[_Said, None]


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
        pieces = fan_in([self._pieces(choice, job, exchange, metrics) for choice in job.choices], _merge)
        try:
            async with cancel_on_disconnect(exchange.receive) as watch, aclosing(pieces):
                await (self._stream if stream else self._collect)(exchange, job, answer, pieces, watch)
        finally:
            usage = job.usage()
            metrics.prompt_tokens += usage.prompt_tokens
            metrics.cached_tokens += usage.prompt_tokens_details.cached_tokens

    async def _collect(
        self, exchange: Exchange, job: Job, answer: Answer, pieces: _Pieces, watch: cancel_on_disconnect
    ) -> None:
        results, running = [Result() for _ in job.choices], len(job.choices)
        async for choice, piece in pieces:
            results[choice.index].add(piece)
            if piece.finish_reason is not None:
                running -= 1
                if not running:
                    entries = sum(len(result.tokens) for result in results) + _echoed_tokens(job, job.choices)
                    body = await self._work.run(entries * _CHARS_PER_LOGPROB, partial(answer.whole, results))
                    watch.stop()
                    self._note_origin(exchange, job)
                    await exchange.send_json(body)

    async def _stream(
        self, exchange: Exchange, job: Job, answer: Answer, pieces: _Pieces, watch: cancel_on_disconnect
    ) -> None:
        running, silent = len(job.choices), {choice.index for choice in job.choices}
        async for choice, piece in pieces:
            if job.echo and choice.index in silent:
                silent.remove(choice.index)
                chars = _echoed_tokens(job, [choice]) * _CHARS_PER_LOGPROB
                event = await self._work.run(chars, partial(answer.event, choice, piece))
            else:
                event = answer.event(choice, piece)
            if not exchange.status:  # only now: until something is there, a refusal can still have its own status
                self._note_origin(exchange, job)
                await exchange.start_events()
            if piece.finish_reason is not None:
                running -= 1
                if not running:
                    watch.stop()
                    await exchange.end_events(event + answer.end())
                    continue
            if event:
                await exchange.send_events(event)

    def explain(self, job: Job) -> list[RouteRecord]:
        """Return how the sequences of a job were routed, as far as that is known here."""
        records = [self._backend.desk.record(choice.request.request_id) for choice in job.choices]
        return [record for record in records if record is not None]

    def _note_origin(self, exchange: Exchange, job: Job) -> None:
        """Say who gives the answer, as far as that is known now."""
        prefills = [choice.prefill for choice in job.choices if choice.prefill is not None]
        exchange.fallback = next((prefill.fallback for prefill in prefills if prefill.fallback), "")
        # During a rolling update, sequences of one request may be served by two bundles.
        exchange.bundle = ", ".join(dict.fromkeys(prefill.bundle for prefill in prefills if prefill.bundle))
        if exchange.wants_explanation:
            replicas = [record.replica for record in self.explain(job) if record.replica]
            exchange.replicas = ", ".join(dict.fromkeys(replicas))

    async def _pieces(self, choice: Choice, job: Job, exchange: Exchange, metrics: ModelMetrics) -> _Pieces:
        """Generate one sequence, until the engine or a stop string ends it."""
        text, clock, last = choice.text, SequenceClock(metrics, exchange.started_s), None
        try:
            async with aclosing(self._backend.generate(choice.request, job.hints)) as deltas:
                async for delta in deltas:
                    if delta.prefill is not None:
                        choice.prefill = delta.prefill
                        clock.saw_prefill(delta.prefill)
                    piece = text.feed(delta)
                    clock.saw_tokens(piece.num_tokens)
                    if piece.finish_reason is not None and delta.finish_reason is None:
                        last = piece  # a stop string: the engine is told before a client that may be slow
                        break
                    yield choice, piece  # the engine's own end is waited for: closing would cancel what is complete
            if last is not None:
                yield choice, last
            elif text.finish_reason is None:
                raise EngineDead("the sequence ended without a finish reason")
        finally:
            clock.close(text)


def _echoed_tokens(job: Job, choices: Sequence[Choice]) -> int:
    return sum(choice.request.prompt_tokens for choice in choices) if job.echo else 0


def _merge(first: _Said, second: _Said) -> _Said:
    return first[0], merge_pieces(first[1], second[1])
