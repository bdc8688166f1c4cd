"""PromptEncoder: from texts and messages to token ids, by the very code that serves the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from serve.ingress.model_files import read_model_files
from serve.ingress.openai import AssistantMessage, Message
from serve.ingress.text import TextModel

_NO_LIMIT = 10**9  # tokens: texts are cut to what was asked for, not refused


@dataclass(frozen=True)
class Encoded:
    """A text as token ids.

    Attributes:
        text: As it was encoded.
        tokens: Its ids.
        prompt_tokens: How many of them come before the last answer; all of them, if there is none.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int


class PromptEncoder:
    """Tokenizer and chat template of one model.

    Args:
        directory: With tokenizer.json, and what else of the tokenizer's files the model has: a checkpoint, or the
            tokenizer of a bundle.

    Raises:
        ConfigError: A file is missing or broken.
    """

    def __init__(self, directory: Path) -> None:
        self._model = TextModel(read_model_files(directory))

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be encoded."""
        return self._model.template is not None

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return self._model.eos_token_ids

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self._model.vocab_size

    def encode(self, text: str) -> Encoded:
        """Encode a text as /v1/completions does: with BOS, where the model wants it."""
        tokens = self._ids(text, add_special_tokens=True)
        return Encoded(text, tokens, len(tokens))

    def encode_plain(self, text: str) -> tuple[int, ...]:
        """Encode a text that follows others: nothing is added."""
        return self._ids(text, add_special_tokens=False)

    def encode_messages(self, messages: Sequence[Message]) -> Encoded:
        """Encode a conversation as /v1/chat/completions does.

        The last message may be an answer: then it is what follows the prompt.

        Raises:
            RequestError: The model has no chat template, or it refuses these messages.
        """
        answered = isinstance(messages[-1], AssistantMessage)
        asked = self._model.render(messages[:-1] if answered else messages)
        prompt = self._ids(asked, add_special_tokens=False)
        if not answered:
            return Encoded(asked, prompt, len(prompt))
        text = self._model.render(messages, add_generation_prompt=False)
        tokens = self._ids(text, add_special_tokens=False)
        # Some templates write a past answer otherwise than where it begins: then only what both have is the prompt.
        return Encoded(text, tokens, common_prefix(prompt, tokens))

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of an answer, without special tokens."""
        return self._model.decode(list(tokens))

    def _ids(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        packed = self._model.encode(text, add_special_tokens=add_special_tokens, room=_NO_LIMIT, param="text")
        return tuple(np.frombuffer(packed, dtype="<u4").tolist())


def read_messages(value: object) -> tuple[Message, ...]:
    """Check messages as they stand in a JSON file.

    Raises:
        ValueError: They are none; says what is wrong.
    """
    try:
        messages = msgspec.convert(value, tuple[Message, ...])
    except msgspec.ValidationError as exc:
        raise ValueError(f"messages: {exc}; write them as for /v1/chat/completions") from None
    if not messages:
        raise ValueError("messages: the list is empty; give at least one")
    if len(messages) == 1 and isinstance(messages[0], AssistantMessage):
        raise ValueError("messages: there is an answer and no question; put a `user` message before it")
    return messages


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many leading tokens are the same."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))
