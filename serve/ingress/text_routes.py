"""TextRoutes: POST /tokenize and POST /detokenize, as vLLM has them."""

from collections.abc import Callable, Mapping

import msgspec

from serve.errors import RequestError
from serve.ingress import openai_answers as answers
from serve.ingress.answer import encode
from serve.ingress.decoding import decode_body
from serve.ingress.exchange import Exchange
from serve.ingress.models import ServedModel, find_model
from serve.ingress.openai import DetokenizeRequest, TokenizeRequest
from serve.ingress.prompts import messages_chars
from serve.ingress.settings import GatewaySettings
from serve.ingress.text_work import TextWork

_CHARS_PER_TOKEN = 4


class TextRoutes:
    """What the tokenizer of a model does, without the model."""

    def __init__(
        self, models: Mapping[str, ServedModel], work: TextWork, settings: Callable[[], GatewaySettings]
    ) -> None:
        """Join what `make_app` made."""
        self._models = models
        self._work = work
        self._settings = settings
        self._tokenize_decoder = msgspec.json.Decoder(TokenizeRequest)
        self._detokenize_decoder = msgspec.json.Decoder(DetokenizeRequest)

    async def tokenize(self, exchange: Exchange) -> None:
        """POST /tokenize."""
        request = decode_body(self._tokenize_decoder, await exchange.read_json(self._settings().max_body_bytes))
        model = find_model(self._models, request.model)
        exchange.model = model.id
        if (request.prompt is None) == (request.messages is None):
            raise RequestError("Send either prompt or messages.", "prompt")
        chars = len(request.prompt) if request.prompt is not None else messages_chars(request.messages or ())
        await exchange.send_json(await self._work.run(chars, lambda: _tokenized(request, model)))

    async def detokenize(self, exchange: Exchange) -> None:
        """POST /detokenize."""
        request = decode_body(self._detokenize_decoder, await exchange.read_json(self._settings().max_body_bytes))
        model = find_model(self._models, request.model)
        exchange.model = model.id
        skip = request.skip_special_tokens is True
        text = await self._work.run(
            len(request.tokens) * _CHARS_PER_TOKEN, lambda: model.text.decode(request.tokens, skip_special_tokens=skip)
        )
        await exchange.send_json(encode(answers.Text(text)))


def _tokenized(request: TokenizeRequest, model: ServedModel) -> bytes:
    if request.prompt is not None:
        text, param, add_special = request.prompt, "prompt", request.add_special_tokens is not False
    else:
        text = model.text.render(
            request.messages or (),
            add_generation_prompt=request.add_generation_prompt is not False,
            variables=request.chat_template_kwargs,
        )
        param, add_special = "messages", request.add_special_tokens is True
    packed = model.text.encode(text, add_special_tokens=add_special, room=model.context_tokens, param=param)
    tokens = memoryview(packed).cast("I").tolist()
    strs = (
        [model.text.bytes_of(token_id).decode("utf-8", "replace") for token_id in tokens]
        if request.return_token_strs
        else None
    )
    return encode(answers.Tokens(len(tokens), model.context_tokens, tokens, strs))
