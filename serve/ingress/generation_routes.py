"""GenerationRoutes: POST /v1/chat/completions and POST /v1/completions."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping

import msgspec

from serve.errors import RequestError
from serve.ingress.answer import Answer, Explain
from serve.ingress.api_error import ApiError
from serve.ingress.chat import ChatAnswer
from serve.ingress.completion import CompletionAnswer
from serve.ingress.decoding import decode_body
from serve.ingress.exchange import Exchange
from serve.ingress.generation import Generation
from serve.ingress.job import Job
from serve.ingress.job_maker import JobMaker
from serve.ingress.metrics import GatewayMetrics
from serve.ingress.models import ServedModel, find_model
from serve.ingress.openai import ChatCompletionRequest, CompletionRequest, GenerationFields
from serve.ingress.prompts import prompt_count
from serve.ingress.settings import GatewaySettings
from serve.ingress.unsupported import check_chat, check_completion


class GenerationRoutes:
    """The two endpoints that generate."""

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        generation: Generation,
        jobs: JobMaker,
        metrics: GatewayMetrics,
        settings: Callable[[], GatewaySettings],
        fallbacks: Callable[[], Mapping[str, str]],
    ) -> None:
        """Join what `make_app` made."""
        self._models = models
        self._generation = generation
        self._jobs = jobs
        self._metrics = metrics
        self._settings = settings
        self._fallbacks = fallbacks
        self._chat_decoder = msgspec.json.Decoder(ChatCompletionRequest)
        self._completion_decoder = msgspec.json.Decoder(CompletionRequest)

    async def chat(self, exchange: Exchange) -> None:
        """POST /v1/chat/completions."""
        settings = self._settings()
        request = decode_body(self._chat_decoder, await exchange.read_json(settings.max_body_bytes))
        model = find_model(self._models, request.model)
        self._note_model(exchange, model)
        exchange.wants_explanation &= settings.debug_routes
        check_chat(request)

        async def prepare() -> tuple[Job, Answer]:
            job = await self._jobs.chat(exchange, request, model, settings)
            usage, timing, explain = _wants_usage(request), exchange.wants_timing, self._explain(exchange, job)
            return job, ChatAnswer(job, exchange.trace_id, include_usage=usage, with_timing=timing, explain=explain)

        await self._run(exchange, request, 1, prepare, settings)

    async def complete(self, exchange: Exchange) -> None:
        """POST /v1/completions."""
        settings = self._settings()
        request = decode_body(self._completion_decoder, await exchange.read_json(settings.max_body_bytes))
        model = find_model(self._models, request.model)
        self._note_model(exchange, model)
        exchange.wants_explanation &= settings.debug_routes
        check_completion(request)

        async def prepare() -> tuple[Job, Answer]:
            job = await self._jobs.complete(exchange, request, model)
            usage, timing, explain = _wants_usage(request), exchange.wants_timing, self._explain(exchange, job)
            return job, CompletionAnswer(
                job, exchange.trace_id, include_usage=usage, with_timing=timing, explain=explain
            )

        await self._run(exchange, request, prompt_count(request), prepare, settings)

    def _explain(self, exchange: Exchange, job: Job) -> Explain | None:
        if not exchange.wants_explanation:
            return None
        return lambda: self._generation.explain(job)

    def _note_model(self, exchange: Exchange, model: ServedModel) -> None:
        """Say which model an answer is about, also if it is an error; the answer of a replica knows its engine best."""
        exchange.model = model.id
        exchange.fallback = self._fallbacks().get(model.id, "")

    async def _run(
        self,
        exchange: Exchange,
        request: GenerationFields,
        prompts: int,
        prepare: Callable[[], Awaitable[tuple[Job, Answer]]],
        settings: GatewaySettings,
    ) -> None:
        sequences = (request.n or 1) * prompts
        if sequences > settings.max_sequences_per_request:
            raise RequestError(
                f"The request asks for {sequences} sequences (n times the number of prompts); this gateway takes "
                f"{settings.max_sequences_per_request} at most.",
                "n" if prompts == 1 else "prompt",
            )
        metrics = self._metrics.models[exchange.model]

        async def work() -> None:
            job, answer = await prepare()
            await self._generation.run(exchange, job, answer, metrics, stream=request.stream is True)

        with self._generation.admitted(sequences, settings):
            await _in_time(work(), settings.request_timeout_s)


async def _in_time(work: Coroutine[None, None, None], limit_s: float | None) -> None:
    if limit_s is None:
        await work
        return
    try:
        async with asyncio.timeout(limit_s):
            await work
    except TimeoutError as exc:
        raise ApiError(408, f"The request took longer than {limit_s:g} s, the limit here.", code="timeout") from exc


def _wants_usage(request: GenerationFields) -> bool:
    return request.stream_options is not None and request.stream_options.include_usage is True
