"""The sampling fields of a request -> SamplingParams. Pure."""

from collections.abc import Sequence
from typing import TypeVar

from serve.core.request import SamplingParams
from serve.errors import ContextTooLong, RequestError
from serve.ingress.models import ServedModel
from serve.ingress.openai import (
    MAX_LOGIT_BIASES,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationFields,
)

_T = TypeVar("_T")

_COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions
_SEED_MASK = 2**63 - 1  # a seed and its successors, as a number that every engine takes


def chat_sampling(request: ChatCompletionRequest, model: ServedModel, max_tokens: int) -> SamplingParams:
    """Return how to sample a chat answer of at most `max_tokens` tokens.

    Raises:
        RequestError: A value does not fit the model; names the field.
    """
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return _sampling(request, model, max_tokens, logprobs, None)


def completion_sampling(request: CompletionRequest, model: ServedModel, max_tokens: int) -> SamplingParams:
    """Return how to sample a completion of at most `max_tokens` tokens.

    Raises:
        RequestError: A value does not fit the model; names the field.
    """
    return _sampling(request, model, max_tokens, request.logprobs, request.logprobs if request.echo else None)


def _sampling(
    request: GenerationFields, model: ServedModel, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    top_p, top_k = _or(request.top_p, 1.0), _or(request.top_k, 0)
    if top_p == 0:  # nothing but the likeliest token is in the empty nucleus
        top_p, top_k = 1.0, 1
    min_tokens = _or(request.min_tokens, 0)
    if min_tokens > max_tokens:
        raise RequestError(f"min_tokens is {min_tokens}, more than the output limit of {max_tokens}.", "min_tokens")
    return SamplingParams(
        temperature=_or(request.temperature, 1.0),
        top_p=top_p,
        top_k=max(top_k, 0),
        min_p=_or(request.min_p, 0.0),
        seed=None if request.seed is None else request.seed & _SEED_MASK,
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        logit_bias=_logit_bias(request.logit_bias, model.vocab_size) if request.logit_bias else {},
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop_token_ids=_stop_token_ids(request, model),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _or(value: _T | None, default: _T) -> _T:
    return default if value is None else value


def seed_of_choice(seed: int | None, choice: int) -> int | None:
    """Return the seed of one of n sequences: they differ, and each is reproducible."""
    return None if seed is None else (seed + choice) & _SEED_MASK


def _logit_bias(biases: dict[str, float], vocab_size: int) -> dict[int, float]:
    if len(biases) > MAX_LOGIT_BIASES:
        raise RequestError(
            f"logit_bias has {len(biases)} entries; at most {MAX_LOGIT_BIASES} are allowed.", "logit_bias"
        )
    result = {}
    for key, bias in biases.items():
        # int() alone would take ' 1', '1_0' and digits of other scripts.
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise RequestError(f"logit_bias has the key {key[:32]!r}, which is no token id.", "logit_bias")
        token_id = int(key)
        check_token_id(token_id, vocab_size, "logit_bias")
        result[token_id] = bias
    return result


def _stop_token_ids(request: GenerationFields, model: ServedModel) -> tuple[int, ...]:
    eos = () if request.ignore_eos else model.text.eos_token_ids
    if not request.stop_token_ids:
        return eos
    for token_id in request.stop_token_ids:
        check_token_id(token_id, model.vocab_size, "stop_token_ids")
    return tuple(dict.fromkeys((*eos, *request.stop_token_ids)))


def check_token_id(token_id: int, vocab_size: int, param: str) -> None:
    """Raise `RequestError` if the model has no such token."""
    if token_id >= vocab_size:
        raise RequestError(f"{param} has the token id {token_id}; this model's are below {vocab_size}.", param)


def stop_strings(request: GenerationFields) -> Sequence[str]:
    """Return the stop strings of a request."""
    if request.stop is None:
        return ()
    return (request.stop,) if isinstance(request.stop, str) else request.stop


def chat_max_tokens(request: ChatCompletionRequest) -> int | None:
    """Return the output limit that a chat request sets."""
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise RequestError(
            f"max_tokens is {old} and max_completion_tokens is {new}: they mean the same. Leave max_tokens out.",
            "max_tokens",
        )
    return old if new is None else new


def output_limit(prompt_tokens: int, asked: int | None, default: int | None, context_tokens: int, param: str) -> int:
    """Return how many tokens may be generated.

    Args:
        prompt_tokens: Length of the prompt.
        asked: What the client asked for.
        default: For a client that asked for nothing; cut to what is left. None: all that is left.
        context_tokens: What the model can hold.
        param: The field that holds the prompt.

    Raises:
        ContextTooLong: It does not fit.
    """
    room = context_tokens - prompt_tokens
    if asked is not None:
        if asked > room:
            raise ContextTooLong(prompt_tokens, asked if room > 0 else None, context_tokens, param)
        return asked
    if room < 1:
        raise ContextTooLong(prompt_tokens, None, context_tokens, param)
    return room if default is None else min(default, room)


def completion_output_limit(request: CompletionRequest, prompt_tokens: int, context_tokens: int) -> int:
    """Return how many tokens of a completion may be generated; 0 scores the prompt.

    Raises:
        ContextTooLong: It does not fit.
    """
    return output_limit(prompt_tokens, request.max_tokens, _COMPLETION_MAX_TOKENS, context_tokens, "prompt")
