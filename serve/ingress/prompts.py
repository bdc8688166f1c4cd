"""The prompt fields of a request -> packed token ids."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from serve.core.request import pack_tokens
from serve.errors import ContextTooLong, RequestError
from serve.ingress.models import ServedModel
from serve.ingress.openai import ChatCompletionRequest, CompletionRequest, Message, TextPart
from serve.ingress.sampling import check_token_id
from serve.ingress.text_work import TextWork

_CHARS_PER_MESSAGE = 64  # a message costs the template about as much as tokenizing so many characters


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        packed: Its token ids, as `pack_tokens` packs them.
        text: What the client wrote; None if it sent token ids.
    """

    packed: bytes
    text: str | None = None


def messages_chars(messages: Sequence[Message]) -> int:
    """Return how long rendering and tokenizing messages takes, in characters of text."""
    chars = _CHARS_PER_MESSAGE * (len(messages) - 1)
    for message in messages:
        content = message.content
        if isinstance(content, str):
            chars += len(content)
        elif content is not None:
            chars += sum(len(part.text if isinstance(part, TextPart) else part.refusal) for part in content)
    return chars


async def chat_prompt(request: ChatCompletionRequest, model: ServedModel, work: TextWork) -> Prompt:
    """Return the prompt of a chat request.

    Raises:
        RequestError: The chat template refuses it, or it is too long.
    """
    variables = request.chat_template_kwargs
    if request.reasoning_effort is not None:
        template = model.text.template
        if template is not None and not template.knows_reasoning_effort:
            raise RequestError(
                "The chat template of this model has no reasoning effort. Leave the field out.",
                "reasoning_effort",
                "unsupported_value",
            )
        variables = {**(variables or {}), "reasoning_effort": request.reasoning_effort}

    def tokenize() -> bytes:
        text = model.text.render(
            request.messages, add_generation_prompt=request.add_generation_prompt is not False, variables=variables
        )
        return model.text.encode(
            text, add_special_tokens=request.add_special_tokens is True, room=model.context_tokens, param="messages"
        )

    packed = await work.run(messages_chars(request.messages), tokenize)
    return Prompt(_not_empty(packed, "messages"))


async def completion_prompts(request: CompletionRequest, model: ServedModel, work: TextWork) -> list[Prompt]:
    """Return the prompts of a completion request, in order.

    Raises:
        RequestError: One is empty, too long, or has a token id that the model has not; or they are of several kinds.
    """
    items = _items(request.prompt)
    make = functools.partial(_completion_prompt, request, model)
    params = ["prompt"] if len(items) == 1 else [f"prompt[{number}]" for number in range(len(items))]
    return await work.run(sum(map(len, items)), lambda: list(map(make, items, params)))


def _items(prompt: str | Sequence[str | int | list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    items = [item for item in prompt if not isinstance(item, int)]
    if not items:
        return [[item for item in prompt if isinstance(item, int)]]
    if len(items) < len(prompt) or len(set(map(type, items))) > 1:
        raise RequestError("prompt mixes strings, token ids or lists of token ids: send one kind.", "prompt")
    return items


def prompt_count(request: CompletionRequest) -> int:
    """Return how many prompts a completion request has."""
    if isinstance(request.prompt, str) or isinstance(request.prompt[0], int):
        return 1
    return len(request.prompt)


def _completion_prompt(request: CompletionRequest, model: ServedModel, item: str | list[int], param: str) -> Prompt:
    if isinstance(item, str):
        packed = model.text.encode(
            item, add_special_tokens=request.add_special_tokens is not False, room=model.context_tokens, param=param
        )
        return Prompt(_not_empty(packed, param), item)
    if len(item) > model.context_tokens:
        raise ContextTooLong(len(item), None, model.context_tokens, param)
    packed = pack_tokens(item)
    check_token_id(int(np.frombuffer(packed, dtype="<u4").max()), model.vocab_size, param)
    return Prompt(packed)


def _not_empty(packed: bytes, param: str) -> bytes:
    if not packed:
        raise RequestError(f"{param} is empty: there is no token to continue from.", param)
    return packed
