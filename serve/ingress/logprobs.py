"""Log probabilities of tokens, as the two OpenAI endpoints write them. Pure, given the bytes of each token."""

from collections.abc import Callable, Iterable

from serve.ingress.openai_answers import ChatLogprobs, CompletionLogprobs, TokenLogprobs, TopLogprob
from serve.ingress.sequence import ShownToken

BytesOf = Callable[[int], bytes]

_LEAST = -9999.0  # OpenAI's number for "as good as impossible"; JSON has no infinity


def finite(logprob: float) -> float:
    """Return a log probability that JSON can hold."""
    return logprob if logprob > _LEAST else _LEAST  # NaN compares false


def _escaped(data: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in data)


def _chat_token(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:  # part of a character
        return _escaped(data)


def _completion_token(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + _escaped(data)


def chat_logprobs(tokens: Iterable[ShownToken], bytes_of: BytesOf) -> ChatLogprobs:
    """Return the `logprobs` of a chat choice."""
    return ChatLogprobs([_chat_entry(token, bytes_of) for token in tokens])


def _chat_entry(token: ShownToken, bytes_of: BytesOf) -> TokenLogprobs:
    data = bytes_of(token.token_id)
    logprob = finite(token.logprob.logprob) if token.logprob is not None else _LEAST
    likely = token.logprob.top if token.logprob is not None else ()
    top = [
        TopLogprob(_chat_token(other), finite(value), list(other))
        for other, value in ((bytes_of(token_id), value) for token_id, value in likely)
    ]
    return TokenLogprobs(_chat_token(data), logprob, list(data), top)


def completion_logprobs(tokens: Iterable[ShownToken], bytes_of: BytesOf, offset: int = 0) -> CompletionLogprobs:
    """Return the `logprobs` of a completion choice.

    Args:
        tokens: In order.
        bytes_of: What each stands for.
        offset: Characters of the choice's text before the first of the sequence's own.
    """
    result = CompletionLogprobs([], [], [], [])
    for token in tokens:
        name = _completion_token(bytes_of(token.token_id))
        result.tokens.append(name)
        result.text_offset.append(offset + token.text_offset)
        if token.logprob is None:
            result.token_logprobs.append(None)
            result.top_logprobs.append(None)
            continue
        logprob = finite(token.logprob.logprob)
        result.token_logprobs.append(logprob)
        top: dict[str, float] = {}
        for token_id, value in token.logprob.top:
            top.setdefault(_completion_token(bytes_of(token_id)), finite(value))
        top.setdefault(name, logprob)  # as OpenAI: its own is always there
        result.top_logprobs.append(top)
    return result
