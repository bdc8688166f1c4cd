"""JobMaker: a decoded request -> the sequences that answer it."""

from serve.errors import RequestError
from serve.ingress.exchange import Exchange
from serve.ingress.job import Job, make_job
from serve.ingress.models import ServedModel
from serve.ingress.openai import ChatCompletionRequest, CompletionRequest, GenerationFields
from serve.ingress.prompts import chat_prompt, completion_prompts
from serve.ingress.sampling import (
    chat_max_tokens,
    chat_sampling,
    completion_output_limit,
    completion_sampling,
    output_limit,
)
from serve.ingress.settings import GatewaySettings
from serve.ingress.text_work import TextWork
from serve.router.hints import RouteHints


class JobMaker:
    """Renders, tokenizes, checks what depends on several fields."""

    def __init__(self, work: TextWork) -> None:
        """Tokenize with `work`."""
        self._work = work

    async def chat(
        self, exchange: Exchange, request: ChatCompletionRequest, model: ServedModel, settings: GatewaySettings
    ) -> Job:
        """Return the job of a chat request.

        Raises:
            RequestError: It cannot be done.
        """
        asked = chat_max_tokens(request)
        prompt = await chat_prompt(request, model, self._work)
        limit = output_limit(
            len(prompt.packed) // 4, asked, settings.default_max_tokens, model.context_tokens, "messages"
        )
        sampling = chat_sampling(request, model, limit)
        hints = _hints(exchange, model, request, request.prompt_cache_key or "", limited=asked is not None)
        return make_job(request, model, [(prompt, sampling)], exchange.trace_id, hints=hints)

    async def complete(self, exchange: Exchange, request: CompletionRequest, model: ServedModel) -> Job:
        """Return the job of a text completion request; raises as `chat` does."""
        prompts = [
            (prompt, completion_sampling(request, model, limit))
            for prompt in await completion_prompts(request, model, self._work)
            for limit in [completion_output_limit(request, len(prompt.packed) // 4, model.context_tokens)]
        ]
        hints = _hints(exchange, model, request)
        return make_job(request, model, prompts, exchange.trace_id, echo=request.echo is True, hints=hints)


def _hints(
    exchange: Exchange, model: ServedModel, request: GenerationFields, session: str = "", *, limited: bool = True
) -> RouteHints:
    return RouteHints(
        request_id=exchange.request_id,
        session=exchange.label(model.session_header) or session,
        tenant=exchange.label(model.tenant_header),
        arrived_s=exchange.started_s,
        limited=limited,
        priority=_priority(exchange.label(model.priority_header), model.priority_header, request.priority or 0),
    )


def _priority(text: str, header: str, otherwise: int) -> int:
    try:
        return int(text) if text else otherwise
    except ValueError:
        raise RequestError(f"{header} is {text!r}: give an integer; lower is served first.", header) from None
