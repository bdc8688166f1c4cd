"""OperatorRoutes: what operators and clients ask about the gateway itself."""

import importlib.metadata
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import UNSET
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from serve.ingress import openai_answers as answers
from serve.ingress.answer import encode
from serve.ingress.backend import Backend, ModelReadiness
from serve.ingress.exchange import Exchange, Handler
from serve.ingress.metrics import GatewayMetrics
from serve.ingress.models import ServedModel, find_model

_MODEL_PREFIX = "/v1/models/"


class OperatorRoutes:
    """GET endpoints; none of them reaches a replica."""

    def __init__(self, models: Mapping[str, ServedModel], backend: Backend, metrics: GatewayMetrics) -> None:
        """Join what `make_app` made."""
        self._models = models
        self._backend = backend
        self._metrics = metrics
        self._version = encode(answers.Version(importlib.metadata.version("raytrt")))

    async def models(self, exchange: Exchange) -> None:
        """GET /v1/models."""
        await exchange.send_json(encode(answers.ModelList([_shown(model) for model in self._models.values()])))

    async def model(self, exchange: Exchange) -> None:
        """GET /v1/models/{model}; the id may contain '/'."""
        model = find_model(self._models, exchange.path.removeprefix(_MODEL_PREFIX))
        await exchange.send_json(encode(_shown(model)))

    async def health(self, exchange: Exchange) -> None:
        """GET /health: the process answers, and says which models are served by their fallback."""
        await exchange.send_json(encode(answers.Health(fallbacks=dict(self._backend.fallbacks()))))

    async def ready(self, exchange: Exchange) -> None:
        """GET /ready: 200 when every model has a replica that takes requests, or sleeps until one comes; else 503."""
        found = {state.model: state for state in await self._backend.readiness()}
        unknown = "the gateway knows no replicas of it"
        states = [found.get(model_id, ModelReadiness(model_id, 0, 0, unknown)) for model_id in self._models]
        ready = all(state.ready_replicas > 0 or state.asleep for state in states)
        shown = [answers.ReadyModel(s.model, s.ready_replicas, s.target_replicas, s.message) for s in states]
        await exchange.send_json(encode(answers.Readiness(ready, shown)), 200 if ready else 503)

    async def version(self, exchange: Exchange) -> None:
        """GET /version."""
        await exchange.send_json(self._version)

    async def metrics(self, exchange: Exchange) -> None:
        """GET /metrics: Prometheus' text format."""
        await exchange.send_json(
            self._metrics.exposition(), headers=[(b"content-type", CONTENT_TYPE_LATEST.encode("ascii"))]
        )

    def document(self, document: Mapping[str, Any]) -> Handler:
        """Return the handler of GET /openapi.json."""
        body = msgspec.json.encode(document)

        async def show(exchange: Exchange) -> None:
            await exchange.send_json(body)

        return show


def _shown(model: ServedModel) -> answers.Model:
    bundle = model.bundle or UNSET
    return answers.Model(model.id, model.created, model.owned_by, model.context_tokens, bundle=bundle)
