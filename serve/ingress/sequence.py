"""SequenceText: the deltas of one sequence -> text that can be shown, with its stop strings and logprobs in step."""

from collections.abc import Sequence

from msgspec import Struct

from serve.core.request import FinishReason, TokenDelta, TokenLogprob
from serve.errors import EngineDead
from serve.ingress.detokenize import Detokenizer
from serve.ingress.stop import StopMatcher


class ShownToken(Struct, frozen=True):
    """A token whose text has been shown, at least in part.

    Attributes:
        logprob: Of the token, and of those that were likely at its place; None for the first token of a prompt.
        token_id: The token.
        text_offset: Characters of the sequence's text before its own.
    """

    token_id: int
    logprob: TokenLogprob | None
    text_offset: int


class Piece(Struct):
    """What one delta adds to what a client sees.

    Attributes:
        text: New text; may be empty.
        tokens: The tokens of the text, if logprobs were asked for.
        finish_reason: `stop` or `length`, with the last piece.
        num_tokens: Tokens that came with it; without those after a stop string.
        emitted_s: As in `TokenDelta`.
    """

    text: str
    tokens: Sequence[ShownToken] = ()
    finish_reason: str | None = None
    num_tokens: int = 0
    emitted_s: float = 0.0


def merge_pieces(first: Piece, second: Piece) -> Piece:
    """Join two consecutive pieces of one sequence."""
    return Piece(
        text=first.text + second.text,
        tokens=[*first.tokens, *second.tokens],
        finish_reason=second.finish_reason,
        num_tokens=first.num_tokens + second.num_tokens,
        emitted_s=first.emitted_s,
    )


class SequenceText:
    """The visible side of one sequence. Feed it every delta, in order, until `finish_reason` is set.

    Attributes:
        completion_tokens: Tokens so far. A token that completes a stop string counts; a stop *token* does not.
        finish_reason: As OpenAI names it; None while the sequence goes on.
    """

    __slots__ = (
        "_detokenizer",
        "_include_stop",
        "_min_tokens",
        "_pending",
        "_received_chars",
        "_shown_chars",
        "_stop",
        "_with_logprobs",
        "completion_tokens",
        "finish_reason",
    )

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: Sequence[str] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
        with_logprobs: bool = False,
    ) -> None:
        """Start a sequence.

        Args:
            detokenizer: A fresh one.
            stops: Strings that end the sequence.
            include_stop: Whether what ended it is shown.
            min_tokens: Stop strings are not looked for in the first so many tokens.
            with_logprobs: Whether pieces have `tokens`.
        """
        self._detokenizer = detokenizer
        self._stop = StopMatcher(stops) if stops else None
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._with_logprobs = with_logprobs
        self._pending: list[ShownToken] = []
        self._received_chars = 0
        self._shown_chars = 0
        self.completion_tokens = 0
        self.finish_reason: str | None = None

    def feed(self, delta: TokenDelta) -> Piece:
        """Take the next delta.

        Raises:
            EngineDead: The engine gave the sequence up.
        """
        if delta.finish_reason is FinishReason.CANCELLED:
            raise EngineDead("the engine cancelled the sequence before its end")
        if self._stop is None and not self._with_logprobs:
            return self._feed_plain(delta)
        return self._feed_each(delta)

    def _feed_plain(self, delta: TokenDelta) -> Piece:
        token_ids = delta.token_ids
        self.completion_tokens += len(token_ids)
        text = self._detokenizer.feed(token_ids) if token_ids else ""
        if delta.finish_reason is not None:
            text += self._ending(delta)
            self.finish_reason = delta.finish_reason.value
        return Piece(text, (), self.finish_reason, len(token_ids), delta.emitted_s)

    def _ending(self, delta: TokenDelta) -> str:
        stop_token = () if delta.stop_token_id is None or not self._include_stop else (delta.stop_token_id,)
        return (
            self._detokenizer.feed(stop_token) + self._detokenizer.flush() if stop_token else self._detokenizer.flush()
        )

    def _feed_each(self, delta: TokenDelta) -> Piece:
        before, parts = self.completion_tokens, []
        for position, token_id in enumerate(delta.token_ids):
            self.completion_tokens += 1
            if self._with_logprobs:
                logprob = delta.logprobs[position] if delta.logprobs else None
                self._pending.append(ShownToken(token_id, logprob, self._received_chars))
            parts.append(self._show(self._detokenizer.feed((token_id,))))
            if self.finish_reason is not None:
                break
        if self.finish_reason is None and delta.finish_reason is not None:
            parts.append(self._show(self._ending(delta)))
            if self.finish_reason is None:
                parts.append(self._stop.flush() if self._stop is not None else "")
                self.finish_reason = delta.finish_reason.value
        text = "".join(parts)
        self._shown_chars += len(text)
        new_tokens = self.completion_tokens - before
        return Piece(text, self._release(), self.finish_reason, new_tokens, delta.emitted_s)

    def _show(self, text: str) -> str:
        self._received_chars += len(text)
        if self._stop is None or self.completion_tokens <= self._min_tokens:
            return text
        shown = self._stop.feed(text)
        if (stop := self._stop.matched) is not None:
            self.finish_reason = FinishReason.STOP.value
            return shown + stop if self._include_stop else shown
        return shown

    def _release(self) -> list[ShownToken]:
        """Return the tokens whose text has begun to show; at the end, all but those of the stop string."""
        if not self._pending:
            return []
        stopped = self._stop is not None and self._stop.matched is not None
        if self.finish_reason is not None and not stopped:
            released, self._pending = self._pending, []
            return released
        count = 0
        while count < len(self._pending) and self._pending[count].text_offset < self._shown_chars:
            count += 1
        released = self._pending[:count]
        del self._pending[:count]
        return released
