"""Token ids to text while they arrive, never half a character, and never a different text than all of them together.

Almost every tokenizer of a language model decodes by concatenation: each token stands for some bytes, and the bytes of
all tokens are UTF-8. Then a table of bytes is exact, costs a fraction of a microsecond for each token, and gives the
bytes that `logprobs` needs. Tokenizers that decode in another way (WordPiece, CTC) go through `Tokenizer.decode` on a
sliding window.

Two known differences from `Tokenizer.decode` of the whole, both on purpose: bytes that are not UTF-8 become one U+FFFD
for each maximal invalid part, as the Unicode standard recommends, where the byte-fallback decoder makes one for each
byte; and a space that a SentencePiece decoder strips from the start of a text is kept where a prompt comes before.
"""

import json
from codecs import utf_8_decode
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from tokenizers import Tokenizer

from serve.ingress.token_bytes import TokenBytes, read_decoder

_CONTEXT_TOKENS = 8  # of the prompt, that a decoder looks at: no character has more bytes than 4
_MAX_PENDING_TOKENS = 16  # no character needs more
_MAX_WINDOW_TOKENS = 64  # of a run of tokens without text


class Detokenizer(Protocol):
    """Turns the tokens of one sequence into text, in order."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """Return the text that is certain after these tokens too; half a character is kept back."""

    def flush(self) -> str:
        """Return what was kept back; the sequence has ended."""


class TableDetokenizer:
    """A `Detokenizer` for tokenizers that decode by concatenation."""

    __slots__ = ("_at_start", "_bytes_of", "_pending", "_strip")

    def __init__(self, table: TokenBytes, strip_start: Callable[[bytes], bytes] | None = None) -> None:
        """Start a sequence.

        Args:
            table: Bytes of each token.
            strip_start: Applied to the first token that stands for something; None: nothing is.
        """
        self._bytes_of = table.__getitem__
        self._pending = b""
        self._strip = strip_start
        self._at_start = strip_start is not None

    def feed(self, token_ids: Sequence[int]) -> str:
        """See `Detokenizer`."""
        if self._at_start:
            return self._feed_start(token_ids)
        data = self._bytes_of(token_ids[0]) if len(token_ids) == 1 else b"".join(map(self._bytes_of, token_ids))
        if self._pending:
            data = self._pending + data
        text, used = utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def _feed_start(self, token_ids: Sequence[int]) -> str:
        assert self._strip is not None
        for position, token_id in enumerate(token_ids):
            if first := self._bytes_of(token_id):
                self._at_start = False
                self._pending = self._strip(first)
                return self.feed(token_ids[position + 1 :])
        return ""

    def flush(self) -> str:
        """See `Detokenizer`."""
        data, self._pending = self._pending, b""
        return data.decode("utf-8", "replace")


class WindowDetokenizer:
    """A `Detokenizer` for any tokenizer: what a window of the last tokens says more, once new ones are added to it."""

    __slots__ = ("_decode", "_known", "_known_text", "_window")

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int] = ()) -> None:
        """Start a sequence after `context`, the last tokens of the prompt."""
        self._decode = decode
        self._window = list(context)
        self._known = len(self._window)  # leading tokens of the window whose text is out
        self._known_text = decode(self._window) if self._window else ""

    def feed(self, token_ids: Sequence[int]) -> str:
        """See `Detokenizer`."""
        return "".join([self._feed_one(token_id) for token_id in token_ids])

    def _feed_one(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith("\ufffd") and len(self._window) - self._known < _MAX_PENDING_TOKENS:
            return ""  # maybe half a character
        return self._advance(text)

    def _advance(self, text: str) -> str:
        new = text[len(self._known_text) :]
        if new or len(self._window) > _MAX_WINDOW_TOKENS:
            del self._window[: self._known]
        self._known = len(self._window)
        self._known_text = self._decode(self._window)
        return new

    def flush(self) -> str:
        """See `Detokenizer`."""
        return self._advance(self._decode(self._window)) if len(self._window) > self._known else ""


class DetokenizerFactory:
    """Makes the detokenizers of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Read the tokenizer's decoder."""
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        state = tokenizer.decoder.__getstate__() if tokenizer.decoder is not None else b"null"
        self._concatenation = read_decoder(json.loads(state))
        self.bytes_of = TokenBytes(self._bytes_of)  # of every token, special ones too
        self._shown = TokenBytes(self._shown_bytes_of)

    def _bytes_of(self, token_id: int) -> bytes:
        if self._concatenation is None:
            text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
            return text.encode()
        token = self._tokenizer.id_to_token(token_id)
        return b"" if token is None else self._concatenation.token_to_bytes(token)

    def _shown_bytes_of(self, token_id: int) -> bytes:
        return b"" if token_id in self._special else self.bytes_of[token_id]

    def make(self, *, skip_special_tokens: bool = True, prompt: Iterable[int] = ()) -> Detokenizer:
        """Start a sequence.

        Args:
            skip_special_tokens: Whether special tokens, such as EOS, stand for nothing.
            prompt: The last tokens before the sequence, if they could end within a character, or be invisible. Empty:
                the sequence stands for itself.
        """
        context = list(prompt)[-_CONTEXT_TOKENS:]
        if self._concatenation is None:
            return WindowDetokenizer(lambda ids: self._decode(ids, skip_special_tokens), context)
        table = self._shown if skip_special_tokens else self.bytes_of
        detokenizer = TableDetokenizer(table, self._concatenation.strip_start)
        detokenizer.feed(context)
        return detokenizer

    def _decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text
