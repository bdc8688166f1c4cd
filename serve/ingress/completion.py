"""CompletionAnswer: what sequences say, as /v1/completions writes it."""

import time
from collections.abc import Sequence

from msgspec import UNSET, UnsetType

from serve.ingress.answer import CONTENT_MARK, DONE, Explain, Result, encode, extras_of, sse, template_of, timing_of
from serve.ingress.job import Choice, Job
from serve.ingress.logprobs import completion_logprobs
from serve.ingress.openai_answers import Completion, CompletionChoice, CompletionLogprobs, Extras, Usage
from serve.ingress.sequence import Piece, ShownToken


class CompletionAnswer:
    """Writes one text completion; an `Answer`."""

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
        self._id = f"cmpl-{trace_id}"
        self._created = int(time.time())
        self._include_usage = include_usage
        self._with_timing = with_timing
        self._explain = explain
        self._templates: dict[int, tuple[bytes, bytes]] = {}
        self._echoes: dict[int, str] = {}

    def whole(self, results: Sequence[Result]) -> bytes:
        """See `Answer`."""
        choices = []
        for choice, result in zip(self._job.choices, results, strict=True):
            text, logprobs = self._begin(choice, "".join(result.text), result.tokens)
            choices.append(CompletionChoice(choice.index, text, logprobs, choice.text.finish_reason))  # type: ignore[arg-type]
        return encode(self._completion(choices, self._job.usage(), extras_of(self._explain)))

    def _begin(self, choice: Choice, text: str, tokens: Sequence[ShownToken]) -> tuple[str, CompletionLogprobs | None]:
        """Return text and logprobs with the prompt before them, if it is echoed."""
        bytes_of = self._job.model.text.bytes_of
        if not self._job.echo:
            return text, completion_logprobs(tokens, bytes_of) if self._job.with_logprobs else None
        echo = self._echo(choice)
        if not self._job.with_logprobs:
            return echo + text, None
        logprobs = completion_logprobs(self._prompt_tokens(choice), bytes_of)
        own = completion_logprobs(tokens, bytes_of, len(echo))
        logprobs.tokens.extend(own.tokens)
        logprobs.token_logprobs.extend(own.token_logprobs)
        logprobs.top_logprobs.extend(own.top_logprobs)
        logprobs.text_offset.extend(own.text_offset)
        return echo + text, logprobs

    def _echo(self, choice: Choice) -> str:
        prompt = choice.prompt
        number = choice.index // self._job.per_prompt
        if number not in self._echoes:
            text = prompt.text
            self._echoes[number] = (
                self._job.model.text.decode(choice.request.prompt_array().tolist()) if text is None else text
            )
        return self._echoes[number]

    def _prompt_tokens(self, choice: Choice) -> list[ShownToken]:
        entries = choice.prefill.prompt_logprobs if choice.prefill is not None else None
        detokenizer = self._job.model.text.detokenizer()
        offset, tokens = 0, []
        for position, token_id in enumerate(choice.request.prompt_array().tolist()):
            tokens.append(ShownToken(token_id, entries[position] if entries else None, offset))
            offset += len(detokenizer.feed((token_id,)))
        return tokens

    def event(self, choice: Choice, piece: Piece) -> bytes:
        """See `Answer`."""
        begun = self._templates.get(choice.index)
        if begun is None or piece.finish_reason is not None or piece.tokens or self._with_timing:
            return self._full_event(choice, piece, first=begun is None)
        if not piece.text:
            return b""
        head, tail = begun
        return b"%b%b%b" % (head, encode(piece.text), tail)

    def _full_event(self, choice: Choice, piece: Piece, *, first: bool) -> bytes:
        text, tokens, logprobs = piece.text, piece.tokens, None
        if first:
            example = CompletionChoice(choice.index, CONTENT_MARK, None, None)
            self._templates[choice.index] = template_of(self._completion([example], None))
            text, logprobs = self._begin(choice, text, tokens)
        elif tokens:
            offset = len(self._echo(choice)) if self._job.echo else 0
            logprobs = completion_logprobs(tokens, self._job.model.text.bytes_of, offset)
        if not text and not (logprobs and logprobs.tokens) and piece.finish_reason is None:
            return b""
        part = CompletionChoice(choice.index, text, logprobs, piece.finish_reason)  # type: ignore[arg-type]
        timing = timing_of(choice, piece) if self._with_timing else UNSET
        return sse(encode(self._completion([part], None, timing)))

    def _completion(
        self, choices: list[CompletionChoice], usage: Usage | None, extras: Extras | UnsetType = UNSET
    ) -> Completion:
        shown = usage if usage is not None or self._include_usage else UNSET
        return Completion(self._id, "text_completion", self._created, self._job.model.id, choices, shown, extras)

    def end(self) -> bytes:
        """See `Answer`."""
        if not self._include_usage and self._explain is None:
            return DONE
        usage = self._job.usage() if self._include_usage else None
        return sse(encode(self._completion([], usage, extras_of(self._explain)))) + DONE
