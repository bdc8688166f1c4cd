"""LoggedRequest: one line of the request log, which the gateway writes on demand and the simulator replays.

JSON, a request a line, written when the request has ended. It holds no text and no token id: prompts are there as
chained block hashes (`serve.core.blocks`), which tell what two prompts share and nothing else.
"""

import hashlib
from collections.abc import Sequence

import msgspec
import numpy as np

from serve.core.blocks import Hashes

VERSION = 1


class LoggedRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """A request that has ended. What is unknown is left out.

    Attributes:
        arrival_s: When it reached the gateway; seconds since 1970.
        route_id: Its name in routing (`serve.core.routing.request.route_id`).
        tokens_per_block: Of the KV cache, and so of the hashes.
        prompt_tokens: > 0.
        max_tokens: Output tokens that were allowed; 0 if the client named no limit.
        output_tokens: Output tokens that there were.
        prompt_hashes: Hashes of the prompt's full blocks as `pack_hashes` packs them; base64 in JSON.
        output_hashes: Hashes of the blocks that the output completed, the prompt's chain continued; empty if they
            were not computed, and then the replayed output is not reused.
        tenant: Name of the tenant; empty: the default one.
        session: `pseudonym` of the session; empty: none.
        lora: Name of the adapter; empty: the base model.
        model: Id of the model in the configuration.
        priority: Lower is served first.
        replica: Who served it; empty: nobody did.
        finish_reason: As the client was told; empty: it failed.
        cached_tokens: Leading prompt tokens that the replica reused.
        ttft_s: From arrival to the first token; 0: there was none.
        duration_s: From arrival to the end.
        version: Of this format.
    """

    arrival_s: float
    route_id: int
    tokens_per_block: int
    prompt_tokens: int
    max_tokens: int = 0
    output_tokens: int = 0
    prompt_hashes: bytes = b""
    output_hashes: bytes = b""
    tenant: str = ""
    session: str = ""
    lora: str = ""
    model: str = ""
    priority: int = 0
    replica: str = ""
    finish_reason: str = ""
    cached_tokens: int = 0
    ttft_s: float = 0.0
    duration_s: float = 0.0
    version: int = msgspec.field(default=VERSION)


class RequestLogFormat:
    """Reads and writes lines of the log. Not thread-safe: each writer has its own."""

    def __init__(self) -> None:
        self._encoder = msgspec.json.Encoder()
        self._decoder = msgspec.json.Decoder(LoggedRequest)

    def encode(self, request: LoggedRequest) -> bytes:
        """Return the request as one line, with its end. The version is always written."""
        line = self._encoder.encode(request)
        return line[:-1] + b',"version":%d}\n' % VERSION

    def decode(self, line: bytes) -> LoggedRequest:
        """Read a line.

        Raises:
            ValueError: It is no line of such a log, or of another version; says what is wrong.
        """
        try:
            request = self._decoder.decode(line)
        except msgspec.DecodeError as exc:
            raise ValueError(str(exc)) from None
        if request.version != VERSION:
            raise ValueError(f"version={request.version} of the request log cannot be read, only {VERSION}")
        if request.prompt_tokens < 1 or request.tokens_per_block < 1 or request.output_tokens < 0:
            raise ValueError("prompt_tokens and tokens_per_block must be positive, output_tokens not negative")
        blocks = request.prompt_tokens // request.tokens_per_block
        if request.prompt_hashes and len(request.prompt_hashes) != 8 * blocks:
            raise ValueError(
                f"prompt_hashes has {len(request.prompt_hashes)} bytes; {request.prompt_tokens} tokens in blocks of "
                f"{request.tokens_per_block} have {blocks} hashes of 8 bytes"
            )
        if len(request.output_hashes) % 8:
            raise ValueError(f"output_hashes has {len(request.output_hashes)} bytes, which are no hashes of 8 bytes")
        return request


def pack_hashes(hashes: Sequence[int] | Hashes) -> bytes:
    """Pack block hashes as little-endian unsigned 64-bit integers."""
    return np.asarray(hashes, dtype="<u8").tobytes()


def unpack_hashes(packed: bytes) -> list[int]:
    """Undo `pack_hashes`."""
    hashes: list[int] = np.frombuffer(packed, dtype="<u8").tolist()
    return hashes


def pseudonym(name: str) -> str:
    """Return what stands for a name that must not be in a log; empty for an empty one."""
    return hashlib.blake2b(name.encode(), digest_size=8).hexdigest() if name else ""
