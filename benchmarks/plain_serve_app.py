"""The comparison: Ray Serve's plain way to stream tokens from a model deployment through a FastAPI ingress."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI, Request
from ray import serve as ray_serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.responses import JSONResponse, Response, StreamingResponse

api = FastAPI()


class Model:
    """Yields one token at a time, as fast as it is read."""

    async def generate(self, num_tokens: int) -> AsyncGenerator[str, None]:
        for number in range(num_tokens):
            yield f" token{number}"
            await asyncio.sleep(0)


@ray_serve.ingress(api)
class Ingress:
    """Turns the model's tokens into an SSE stream."""

    def __init__(self, model: DeploymentHandle) -> None:
        self._model = model.options(stream=True)

    @api.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        """Stream `max_tokens` tokens, or send them together."""
        body = await request.json()
        num_tokens = int(body["max_tokens"])
        if not body.get("stream"):
            text = "".join([text async for text in self._model.generate.remote(num_tokens)])
            return JSONResponse({"choices": [{"index": 0, "text": text}]})

        async def events() -> AsyncGenerator[str, None]:
            async for text in self._model.generate.remote(num_tokens):
                yield f"data: {json.dumps({'choices': [{'index': 0, 'text': text}]})}\n\n"
            yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': num_tokens}})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    @api.get("/ready")
    def ready(self) -> dict[str, Any]:
        """Answer when the application runs."""
        return {"models": []}


def build_app(_args: dict[str, Any]) -> Application:
    """Build the application."""
    options: dict[str, Any] = {"max_ongoing_requests": 1000, "ray_actor_options": {"num_cpus": 0.1}}
    model = ray_serve.deployment(Model, name="model", **options)
    return ray_serve.deployment(Ingress, name="ingress", **options).bind(model.bind())
