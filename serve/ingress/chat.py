"""ChatAnswer: what sequences say, as /v1/chat/completions writes it."""

import time
from collections.abc import Sequence

from msgspec import UNSET, UnsetType

from serve.ingress.answer import CONTENT_MARK, DONE, Explain, Result, encode, extras_of, sse, template_of, timing_of
from serve.ingress.job import Choice, Job
from serve.ingress.logprobs import chat_logprobs
from serve.ingress.openai_answers import (
    AnswerMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    Extras,
    Usage,
)
from serve.ingress.sequence import Piece, ShownToken


class ChatAnswer:
    """Writes one chat answer; an `Answer`."""

    def __init__(
        self,
        job: Job,
        trace_id: str,
        *,
        include_usage: bool = False,
        with_timing: bool = False,
        explain: Explain | None = None,
    ) -> None:
        """Begin the answer to a job."""
        self._job = job
        self._id = f"chatcmpl-{trace_id}"
        self._created = int(time.time())
        self._include_usage = include_usage
        self._with_timing = with_timing
        self._explain = explain
        self._templates: dict[int, tuple[bytes, bytes]] = {}

    def whole(self, results: Sequence[Result]) -> bytes:
        """See `Answer`."""
        choices = [
            ChatChoice(
                choice.index,
                AnswerMessage("assistant", "".join(result.text)),
                self._logprobs(result.tokens),
                choice.text.finish_reason,  # type: ignore[arg-type]  # it has ended
            )
            for choice, result in zip(self._job.choices, results, strict=True)
        ]
        model, usage, extras = self._job.model.id, self._job.usage(), extras_of(self._explain)
        return encode(ChatCompletion(self._id, "chat.completion", self._created, model, choices, usage, extras))

    def _logprobs(self, tokens: Sequence[ShownToken]) -> ChatLogprobs | None:
        return chat_logprobs(tokens, self._job.model.text.bytes_of) if self._job.with_logprobs else None

    def event(self, choice: Choice, piece: Piece) -> bytes:
        """See `Answer`. The first event of a sequence has the role, whether or not there is text yet."""
        begun = self._templates.get(choice.index)
        if begun is None or piece.finish_reason is not None or piece.tokens or self._with_timing:
            return self._full_event(choice, piece, first=begun is None)
        if not piece.text:
            return b""
        head, tail = begun
        return b"%b%b%b" % (head, encode(piece.text), tail)

    def _full_event(self, choice: Choice, piece: Piece, *, first: bool) -> bytes:
        if first:
            example = ChatChunkChoice(choice.index, ChatDelta(content=CONTENT_MARK), None, None)
            self._templates[choice.index] = template_of(self._chunk([example]))
        elif not piece.text and not piece.tokens and piece.finish_reason is None:
            return b""
        delta = ChatDelta("assistant" if first else UNSET, piece.text if first or piece.text else UNSET)
        logprobs = self._logprobs(piece.tokens) if piece.tokens else None
        part = ChatChunkChoice(choice.index, delta, logprobs, piece.finish_reason)  # type: ignore[arg-type]
        return sse(encode(self._chunk([part], extras=timing_of(choice, piece) if self._with_timing else UNSET)))

    def _chunk(
        self, choices: list[ChatChunkChoice], usage: Usage | None = None, extras: Extras | UnsetType = UNSET
    ) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            self._id,
            "chat.completion.chunk",
            self._created,
            self._job.model.id,
            choices,
            usage if self._include_usage else UNSET,
            extras,
        )

    def end(self) -> bytes:
        """See `Answer`."""
        if not self._include_usage and self._explain is None:
            return DONE
        return sse(encode(self._chunk([], self._job.usage(), extras_of(self._explain)))) + DONE
