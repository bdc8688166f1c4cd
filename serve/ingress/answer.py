"""Answer port: how an endpoint writes what its sequences say; and the parts that both endpoints share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from serve.ingress.job import Choice
from serve.ingress.openai_answers import Extras
from serve.ingress.sequence import Piece, ShownToken
from serve.router.records import RouteRecord

DONE = b"data: [DONE]\n\n"
Explain = Callable[[], list[RouteRecord]]  # how the sequences of a job were routed
CONTENT_MARK = "\x00content\x00"  # stands in a template where the text goes; no model id has it

encode = msgspec.json.Encoder().encode


@dataclass(slots=True)
class Result:
    """All that one sequence said."""

    text: list[str] = field(default_factory=list)
    tokens: list[ShownToken] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """Append what a piece adds."""
        if piece.text:
            self.text.append(piece.text)
        if piece.tokens:
            self.tokens.extend(piece.tokens)


class Answer(Protocol):
    """Writes one answer."""

    def whole(self, results: Sequence[Result]) -> bytes:
        """Return the answer as one JSON text; every sequence has ended."""

    def event(self, choice: Choice, piece: Piece) -> bytes:
        """Return the event for a piece; empty if there is nothing to say."""

    def end(self) -> bytes:
        """Return the last events: usage and routing, if they were asked for, and `[DONE]`."""


def sse(data: bytes) -> bytes:
    """Return a server-sent event."""
    return b"data: " + data + b"\n\n"


def template_of(example: msgspec.Struct) -> tuple[bytes, bytes]:
    """Return what comes before and after the text in an event; `example` has `CONTENT_MARK` for its text."""
    head, tail = sse(encode(example)).split(encode(CONTENT_MARK))
    return head, tail


def extras_of(explain: Explain | None) -> Extras | UnsetType:
    """Return the part of an answer that explains its routing, if that was asked for."""
    return UNSET if explain is None else Extras(routing=explain())


def timing_of(choice: Choice, piece: Piece) -> Extras:
    """Return the timing part of an event."""
    if piece.finish_reason is None or choice.prefill is None:
        return Extras(piece.emitted_s, piece.num_tokens)
    return Extras(piece.emitted_s, piece.num_tokens, choice.prefill.queue_s, choice.prefill.prefill_s)
