"""Refuses what a request asks for and the gateway cannot do. Pure.

A field that changes nothing about an answer is accepted; one that does is refused by name, never ignored.
"""

from collections.abc import Callable
from typing import Any

from serve.errors import RequestError
from serve.ingress.openai import ChatCompletionRequest, CompletionRequest, GenerationFields

_NO_TOOLS = "Tools are not supported yet. Leave the field out."


def _empty(value: Any) -> bool:
    return not value


def _one_of(*allowed: Any) -> Callable[[Any], bool]:
    return lambda value: value in allowed


# field of a chat request: (the values that ask for what happens anyway, why others cannot be honoured)
_CHAT: dict[str, tuple[Callable[[Any], bool], str]] = {
    "tools": (_empty, _NO_TOOLS),
    "functions": (_empty, _NO_TOOLS),
    "tool_choice": (_one_of("none"), _NO_TOOLS),
    "function_call": (_one_of("none"), _NO_TOOLS),
    "modalities": (_one_of(["text"]), "Answers are text. Leave the field out."),
    "audio": (_one_of(), "Answers are text. Leave the field out."),
    "prediction": (_one_of(), "Predicted outputs are not supported. Leave the field out."),
    "web_search_options": (_one_of(), "Web search is not supported. Leave the field out."),
    "prompt_cache_retention": (
        _one_of("in-memory", "in_memory"),
        "Prefixes are cached in memory. Leave the field out.",
    ),
    "service_tier": (_one_of("auto", "default"), "There is one service tier. Leave the field out."),
    "store": (_one_of(False), "Answers are not stored. Leave the field out."),
    "verbosity": (_one_of("medium"), "Verbosity cannot be set. Leave the field out, and ask for it in a message."),
}


def check_chat(request: ChatCompletionRequest) -> None:
    """Raise `RequestError` if a chat request asks for what cannot be done."""
    for name, (harmless, why) in _CHAT.items():
        value = getattr(request, name)
        if value is not None and not harmless(value):
            raise RequestError(why, name, "unsupported_value")
    if request.response_format is not None and request.response_format.type != "text":
        raise RequestError(
            f"response_format of type '{request.response_format.type}' is not supported yet: use 'text', and ask for "
            "the form in a message.",
            "response_format.type",
            "unsupported_value",
        )
    if request.top_logprobs and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true.", "top_logprobs")
    _check_common(request)


def check_completion(request: CompletionRequest) -> None:
    """Raise `RequestError` if a completion request asks for what cannot be done."""
    if request.suffix:
        raise RequestError(
            "Insertion before a suffix is not supported. Leave the field out.", "suffix", "unsupported_value"
        )
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise RequestError(
            f"best_of is {request.best_of} and n is {request.n or 1}: choosing the best of more sequences than are "
            "returned is not supported. Leave best_of out.",
            "best_of",
            "unsupported_value",
        )
    _check_common(request)


def _check_common(request: GenerationFields) -> None:
    options = request.stream_options
    if options is None:
        return
    if not request.stream:
        raise RequestError("stream_options needs stream to be true.", "stream_options")
    if options.include_obfuscation:
        raise RequestError(
            "Streams are not padded. Leave the field out.", "stream_options.include_obfuscation", "unsupported_value"
        )
