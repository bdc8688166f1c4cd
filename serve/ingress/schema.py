"""The OpenAPI document of the gateway, generated from the structs that decode requests and encode answers."""

import importlib.metadata
from collections.abc import Sequence
from typing import Any

import msgspec

from serve.ingress import openai
from serve.ingress import openai_answers as answers
from serve.ingress.api_error import ErrorResponse

_STRUCTS = (
    openai.ChatCompletionRequest,
    openai.CompletionRequest,
    openai.TokenizeRequest,
    openai.DetokenizeRequest,
    answers.ChatCompletion,
    answers.ChatCompletionChunk,
    answers.Completion,
    answers.Model,
    answers.ModelList,
    answers.Tokens,
    answers.Text,
    answers.Version,
    answers.Health,
    answers.Readiness,
    answers.RoutedRequest,
    answers.RoutePreview,
    ErrorResponse,
)
_ERRORS = {
    400: "A field is wrong, unknown or cannot be honoured; `param` names it.",
    404: "No such model, or nothing is known of such a request.",
    405: "No such method.",
    408: "The request took longer than the limit of this gateway.",
    413: "The body is too long.",
    415: "The body is not declared as JSON.",
    429: "The gateway holds as many sequences as it takes.",
    500: "A defect of the gateway.",
    503: "The engine is overloaded, or was lost.",
}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}
_EVERY_HEADER = {
    "X-Request-Id": {"description": "Taken from the request, or made.", "schema": {"type": "string"}},
    "X-Response-Time": {
        "description": "From the request to the head of the answer, in milliseconds.",
        "schema": {"type": "string", "pattern": "^[0-9]+[.][0-9]{3}ms$"},
    },
}


def openapi_document(model_ids: Sequence[str]) -> dict[str, Any]:
    """Return the document, for the models that are served."""
    _, schemas = msgspec.json.schema_components(_STRUCTS, ref_template="#/components/schemas/{name}")
    for name in ("ChatCompletionRequest", "CompletionRequest", "TokenizeRequest", "DetokenizeRequest"):
        schemas[name]["properties"]["model"]["enum"] = list(model_ids)
    return {
        "openapi": "3.2.0",
        "info": {
            "title": "RayTRT gateway",
            "description": "OpenAI's API for text, with extensions that users of vLLM and TensorRT-LLM know.",
            "version": importlib.metadata.version("raytrt"),
        },
        "paths": {
            "/v1/chat/completions": _post("chat", "ChatCompletionRequest", "ChatCompletion", "ChatCompletionChunk"),
            "/v1/completions": _post("complete", "CompletionRequest", "Completion", "Completion"),
            "/v1/models": _get("listModels", "The models that are served.", "ModelList"),
            "/v1/models/{model}": _get("showModel", "One model.", "Model", parameter=_model_parameter(model_ids)),
            "/tokenize": _post("tokenize", "TokenizeRequest", "Tokens"),
            "/detokenize": _post("detokenize", "DetokenizeRequest", "Text"),
            "/debug/route": _post("previewRoute", ("ChatCompletionRequest", "CompletionRequest"), "RoutePreview"),
            "/debug/requests/{request}": _get(
                "showRouting", "How a request was routed.", "RoutedRequest", parameter=_request_parameter()
            ),
            "/health": _get("health", "Whether the process lives.", "Health"),
            "/ready": _ready(),
            "/version": _get("version", "The release.", "Version"),
            "/metrics": {"get": {"operationId": "metrics", "summary": "Prometheus metrics.", "responses": _metrics()}},
        },
        "components": {"schemas": schemas},
    }


def _reference(schema: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{schema}"}


def _json(*schemas: str) -> dict[str, Any]:
    """Return the content of a body that one of the schemas describes."""
    parts = [_reference(schema) for schema in schemas]
    return {"application/json": {"schema": parts[0] if len(parts) == 1 else {"anyOf": parts}}}


def _errors(*statuses: int) -> dict[str, Any]:
    return {
        str(status): {
            "description": _ERRORS[status],
            "content": _json("ErrorResponse"),
            "headers": {**_EVERY_HEADER, **(_RETRY_AFTER if status in (429, 503) else {})},
        }
        for status in statuses
    }


def _answer(schema: str) -> dict[str, Any]:
    return {"description": "The answer.", "content": _json(schema), "headers": _EVERY_HEADER}


def _event(schema: str) -> dict[str, Any]:
    """A server-sent event, as OpenAPI 3.2 describes it; the version before could not."""
    either = {"anyOf": [_reference(schema), _reference("ErrorResponse")]}
    event = {"contentMediaType": "application/json", "contentSchema": either}
    done = {"const": "[DONE]", "description": "The last event of a stream that is complete."}
    return {
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"type": "string", "anyOf": [done, event]}},
    }


def _post(operation: str, request: str | tuple[str, ...], answer: str, event: str | None = None) -> dict[str, Any]:
    bodies = (request,) if isinstance(request, str) else request
    success = _answer(answer)
    if event is not None:
        success["content"]["text/event-stream"] = {"itemSchema": _event(event)}
    return {
        "post": {
            "operationId": operation,
            "requestBody": {"required": True, "content": _json(*bodies)},
            "responses": {"200": success, **_errors(400, 404, 408, 413, 415, 429, 500, 503)},
        }
    }


def _get(operation: str, summary: str, answer: str, parameter: dict[str, Any] | None = None) -> dict[str, Any]:
    get: dict[str, Any] = {
        "operationId": operation,
        "summary": summary,
        "responses": {"200": _answer(answer), **_errors(404, 405, 500)},
    }
    if parameter is not None:
        get["parameters"] = [parameter]
    return {"get": get}


def _model_parameter(model_ids: Sequence[str]) -> dict[str, Any]:
    return {
        "name": "model",
        "in": "path",
        "required": True,
        "description": "May contain '/'.",
        "schema": {"type": "string", "minLength": 1},
        "examples": {model_id: {"value": model_id} for model_id in model_ids},
    }


def _request_parameter() -> dict[str, Any]:
    return {
        "name": "request",
        "in": "path",
        "required": True,
        "description": "The x-request-id of an answer.",
        "schema": {"type": "string", "minLength": 1},
    }


def _ready() -> dict[str, Any]:
    ready = _get("ready", "Whether every model has a replica that takes requests.", "Readiness")
    ready["get"]["responses"]["503"] = {**_answer("Readiness"), "description": "A model has none."}
    return ready


def _metrics() -> dict[str, Any]:
    text = {"text/plain": {"schema": {"type": "string"}}}
    return {
        "200": {"description": "Prometheus' text format.", "content": text, "headers": _EVERY_HEADER},
        **_errors(500),
    }
