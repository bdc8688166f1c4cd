"""GenerateRequest, TokenDelta and what they hold: the values that cross every boundary.

They are msgspec structs in array form: a change of the fields is a change of the wire format and raises `WIRE_VERSION`,
which `GenerateRequest` carries, so that a gateway and a replica of different releases refuse each other by name
instead of misreading each other during a rolling update.
"""

from array import array
from collections.abc import Iterable
from enum import StrEnum
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

WIRE_VERSION = 4


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # a stop token id was generated
    LENGTH = "length"  # max_tokens, or the end of the context
    CANCELLED = "cancelled"  # the engine was told to, or is being shut down


class SamplingParams(msgspec.Struct, frozen=True, array_like=True):
    """How the next token is chosen. Defaults are OpenAI's; every value has been validated by the gateway.

    The order of application is that of vLLM and TensorRT-LLM: penalties and bias on the logits, `min_tokens`
    masking, temperature, then top_k, top_p and min_p filters on the probabilities, then the draw.

    Attributes:
        temperature: >= 0; 0 is greedy, and then seed, top_k, top_p and min_p have no effect.
        top_p: In (0, 1]; 1 keeps all.
        top_k: >= 0; 0 keeps all.
        min_p: In [0, 1]; keeps tokens at least this likely relative to the likeliest. 0 keeps all.
        seed: Same seed, prompt and params on the same engine give the same tokens, whatever else is in the batch.
            None draws afresh.
        repetition_penalty: > 0; divides positive and multiplies negative logits of tokens in prompt or output
            (Keskar et al., CTRL, 2019). 1 is off.
        presence_penalty, frequency_penalty: In [-2, 2]; subtracted once, and times the count, for tokens in the output
            (not the prompt), as OpenAI documents them. 0 is off.
        logit_bias: Token id to a value in [-100, 100] that is added to its logit.
        max_tokens: >= 0 tokens to generate at most; 0 asks for the prompt's logprobs only.
        min_tokens: Stop tokens cannot be drawn before this many tokens.
        stop_token_ids: Generating one of these ends the sequence; the gateway puts the model's EOS ids here, unless
            the client asked to ignore them. An engine knows no other stop token.
        logprobs: None: none. k >= 0: for each generated token its own log probability and the k likeliest tokens'.
            Taken from the raw logits, before penalties, bias, temperature and filters.
        prompt_logprobs: The same for the prompt's tokens, delivered with the first delta; None: none.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None


def pack_tokens(token_ids: Iterable[int]) -> bytes:
    """Pack token ids, each in [0, 2**32), as little-endian unsigned 32-bit integers.

    Raises:
        OverflowError: An id is out of range.
    """
    return array("I", token_ids).tobytes()


class GenerateRequest(msgspec.Struct, frozen=True, array_like=True):
    """One sequence to generate. n > 1 and batches of prompts are several of these.

    Attributes:
        request_id: Unique among all sequences in flight on an engine.
        model: The id of the model in the configuration.
        prompt: Token ids as `pack_tokens` packs them, at least one. A packed prompt of 128k tokens crosses a process
            border in microseconds; a list of ints takes milliseconds of two event loops.
        sampling: How to choose tokens, and when to end.
        cache_salt: Requests share KV blocks only with requests of the same salt.
        reply_to: Where a replica sends the deltas (`serve.datapath.frames.ReplyAddress` as text); engines ignore it.
        wire_version: Refused by the decoder if it is not its own. It stays the seventh, wherever others are added.
        expected_cached_tokens: Leading prompt tokens that the gateway believes the replica to hold; engines ignore it.
        lora: LoRA adapter of the sequence; empty: the base model. Block hashes depend on it.
    """

    request_id: str
    model: str
    prompt: bytes
    sampling: SamplingParams = SamplingParams()
    cache_salt: str = ""
    reply_to: str = ""
    wire_version: int = WIRE_VERSION
    expected_cached_tokens: int = 0
    lora: str = ""

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens in the prompt."""
        return len(self.prompt) // 4

    def prompt_array(self) -> npt.NDArray[np.uint32]:
        """Return the prompt's token ids, (prompt_tokens,), without a copy."""
        return np.frombuffer(self.prompt, dtype="<u4")

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled (by Serve's handle) as one msgpack string: ten times faster than field by field, and version-checked.
        return decode_request, (_encoder.encode(self),)


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log probability (natural, <= 0) of one token, and of the likeliest tokens at its position.

    Attributes:
        token_id: The token that stands there.
        logprob: Its log probability.
        top: (token id, log probability) of the likeliest, in descending order; as many as were asked for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class PrefillInfo(msgspec.Struct, frozen=True, array_like=True):
    """What is known once the prompt has been processed; sent with the first delta.

    Attributes:
        cached_tokens: Leading prompt tokens whose KV blocks were reused.
        queue_s: From the engine taking the request to its first prefill step.
        prefill_s: From there to the first token.
        prompt_logprobs: One entry a prompt token, if they were asked for; None for the first, which nothing predicts.
        fallback: Engine, or engine and bundle, that serves in the place of what was configured; else empty.
        bundle: Fingerprint of the bundle that serves; empty: a checkpoint does.
    """

    cached_tokens: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    fallback: str = ""
    bundle: str = ""


class TokenDelta(msgspec.Struct, frozen=True, array_like=True):
    """The next tokens of one sequence, in order, none twice.

    Attributes:
        token_ids: New tokens; may be empty in the first and the last delta only. A stop token is not among them.
        finish_reason: Set on the last delta, and on no other.
        stop_token_id: The stop token that ended the sequence, with `FinishReason.STOP`.
        logprobs: One entry for each of `token_ids`, if they were asked for.
        prefill: Set on the first delta, and on no other.
        emitted_s: `time.monotonic()` of the engine's host when the first of `token_ids` was emitted; 0 if unknown.
    """

    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    prefill: PrefillInfo | None = None
    emitted_s: float = 0.0


def merge_deltas(first: TokenDelta, second: TokenDelta) -> TokenDelta:
    """Join two consecutive deltas of one sequence into one that says the same."""
    logprobs = first.logprobs
    if second.logprobs is not None:
        logprobs = (logprobs or ()) + second.logprobs
    return TokenDelta(
        token_ids=first.token_ids + second.token_ids,
        finish_reason=second.finish_reason,
        stop_token_id=second.stop_token_id,
        logprobs=logprobs,
        prefill=first.prefill,
        emitted_s=first.emitted_s if first.token_ids else second.emitted_s,
    )


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(GenerateRequest)


def decode_request(data: bytes) -> GenerateRequest:
    """Decode a `GenerateRequest`.

    Raises:
        ValueError: The sender speaks another version of the wire format.
    """
    request = _decoder.decode(data)
    if request.wire_version != WIRE_VERSION:
        raise ValueError(
            f"the gateway speaks wire version {request.wire_version}, this replica {WIRE_VERSION}: "
            "run the same release of raytrt on every node"
        )
    return request
