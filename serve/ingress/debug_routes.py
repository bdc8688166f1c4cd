"""DebugRoutes: how a request was routed, and where one would go."""

from collections.abc import Callable, Mapping

import msgspec

from serve.ingress import openai_answers as answers
from serve.ingress.answer import encode
from serve.ingress.api_error import ApiError, printable
from serve.ingress.decoding import decode_body
from serve.ingress.exchange import Exchange
from serve.ingress.job import Job
from serve.ingress.job_maker import JobMaker
from serve.ingress.models import ServedModel, find_model
from serve.ingress.openai import ChatCompletionRequest, CompletionRequest
from serve.ingress.routing_desk import RoutingDesk
from serve.ingress.settings import GatewaySettings
from serve.ingress.unsupported import check_chat, check_completion

REQUESTS_PREFIX = "/debug/requests/"


class _Kind(msgspec.Struct):
    """What tells a chat from a completion."""

    messages: msgspec.Raw = msgspec.Raw(b"")


class DebugRoutes:
    """The endpoints; `debug_routes` in the settings turns them off."""

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        jobs: JobMaker,
        desk: RoutingDesk,
        settings: Callable[[], GatewaySettings],
    ) -> None:
        """Join what `make_app` made."""
        self._models = models
        self._jobs = jobs
        self._desk = desk
        self._settings = settings
        self._kind_decoder = msgspec.json.Decoder(_Kind)
        self._chat_decoder = msgspec.json.Decoder(ChatCompletionRequest)
        self._completion_decoder = msgspec.json.Decoder(CompletionRequest)

    async def request(self, exchange: Exchange) -> None:
        """GET /debug/requests/{request}; the id may contain '/'."""
        settings = self._permitted()
        request_id = exchange.path.removeprefix(REQUESTS_PREFIX)
        records = await self._desk.records(request_id)
        if not records:
            raise ApiError(
                404,
                f"No gateway remembers a request '{printable(request_id)}'. Ask for the x-request-id of an answer; "
                f"a gateway remembers its last {settings.routing_records} sequences (gateway.limits.routing_records).",
                code="request_not_found",
            )
        await exchange.send_json(encode(answers.RoutedRequest(request_id, records)))

    async def route(self, exchange: Exchange) -> None:
        """POST /debug/route: a body of /v1/chat/completions or /v1/completions; nothing is run, nothing changes."""
        settings = self._permitted()
        body = await exchange.read_json(settings.max_body_bytes)
        job = await self._job(exchange, body, settings)
        exchange.model = job.model.id
        records = []
        for choice in job.choices[:: job.per_prompt]:
            record = self._desk.preview(choice.request, job.hints)
            if record is None:
                raise ApiError(
                    400,
                    f"Ray Serve's own router places the requests of '{job.model.id}' (routing: serve), and cannot be "
                    "asked. Give the model another routing policy.",
                    param="model",
                    code="not_routed_here",
                )
            records.append(record)
        await exchange.send_json(encode(answers.RoutePreview(job.model.id, records)))

    async def _job(self, exchange: Exchange, body: bytes, settings: GatewaySettings) -> Job:
        if bytes(decode_body(self._kind_decoder, body).messages):
            chat = decode_body(self._chat_decoder, body)
            model = find_model(self._models, chat.model)
            check_chat(chat)
            return await self._jobs.chat(exchange, chat, model, settings)
        completion = decode_body(self._completion_decoder, body)
        model = find_model(self._models, completion.model)
        check_completion(completion)
        return await self._jobs.complete(exchange, completion, model)

    def _permitted(self) -> GatewaySettings:
        settings = self._settings()
        if not settings.debug_routes:
            raise ApiError(404, "Debug routes are turned off here (gateway.limits.debug_routes).", code="not_found")
        return settings
