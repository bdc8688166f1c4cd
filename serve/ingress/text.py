"""TextModel: the text side of a model. Text and messages to token ids, token ids to text."""

from collections.abc import Mapping, Sequence
from typing import Any

from serve.core.request import pack_tokens
from serve.errors import ContextTooLong, RequestError
from serve.ingress.detokenize import Detokenizer, DetokenizerFactory
from serve.ingress.model_files import ModelFiles
from serve.ingress.openai import Message
from serve.ingress.template import ChatTemplate

_DECODED_AT_ONCE = 4096  # tokens, well below a millisecond


class TextModel:
    """Tokenizer and chat template of one model. Methods block for as long as the text is long; they are thread-safe.

    Attributes:
        eos_token_ids: Tokens that end an answer.
        vocab_size: Token ids are below this.
        template: None if the model has none.
    """

    def __init__(self, files: ModelFiles) -> None:
        """Prepare what was read.

        Raises:
            ConfigError: The chat template is broken.
        """
        self._tokenizer = files.tokenizer
        self._detokenizers = DetokenizerFactory(files.tokenizer)
        self.eos_token_ids = files.eos_token_ids
        self.vocab_size = files.vocab_size
        self.template = (
            ChatTemplate(files.chat_template, files.special_tokens, files.chat_template_origin)
            if files.chat_template is not None
            else None
        )
        bos = files.special_tokens.get("bos_token")
        self._bos_id: int | None = None if bos is None else self._tokenizer.token_to_id(bos)
        self._wants_bos = files.add_bos

    def encode(self, text: str, *, add_special_tokens: bool, room: int, param: str) -> bytes:
        """Return the token ids of a text, as `pack_tokens` packs them.

        Releases the GIL while it tokenizes; only `Tokenizer.encode_batch*` does (tokenizers 0.22 and 0.23).

        Args:
            text: Any text.
            add_special_tokens: Whether the model's own, such as BOS, are added.
            room: Tokens there may be: the model's context.
            param: The field that holds the text, for the error.

        Raises:
            ContextTooLong: There are more than `room`.
        """
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        if len(encoding) > room:  # before the ids: a list of millions of them would hold the GIL
            raise ContextTooLong(len(encoding), None, room, param)
        ids: list[int] = encoding.ids
        if add_special_tokens and self._bos_id is not None and self._wants_bos is not None:
            ids = self._with_bos(ids, text)
        return pack_tokens(ids)

    def _with_bos(self, ids: list[int], text: str) -> list[int]:
        """Apply `add_bos_token` of tokenizer_config.json, which wins over tokenizer.json, as in transformers."""
        assert self._bos_id is not None
        has_bos = ids[:1] == [self._bos_id]
        if self._wants_bos and not has_bos:
            return [self._bos_id, *ids]
        if has_bos and not self._wants_bos:
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
            return list(encoding.ids)
        return ids

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt that the chat template makes of messages.

        Raises:
            RequestError: The model has no template, or it refuses these messages.
        """
        if self.template is None:
            raise RequestError(
                "This model has no chat template. Use /v1/completions, or serve it with a chat_template.jinja.", "model"
            )
        return self.template.render(messages, add_generation_prompt=add_generation_prompt, variables=variables)

    def detokenizer(self, *, skip_special_tokens: bool = True, prompt: Sequence[int] = ()) -> Detokenizer:
        """Return a fresh detokenizer for a sequence that follows `prompt`, of which the last tokens are enough."""
        return self._detokenizers.make(skip_special_tokens=skip_special_tokens, prompt=prompt)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of a sequence that nothing comes before."""
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        # In parts: one call for all would hold the GIL for as long as the sequence is.
        starts = range(0, len(token_ids), _DECODED_AT_ONCE)
        parts = [detokenizer.feed(token_ids[start : start + _DECODED_AT_ONCE]) for start in starts]
        return "".join(parts) + detokenizer.flush()

    def bytes_of(self, token_id: int) -> bytes:
        """Return what a token stands for, special or not; nothing if the tokenizer does not know it."""
        return self._detokenizers.bytes_of[token_id]
