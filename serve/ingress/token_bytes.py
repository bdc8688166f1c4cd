"""TokenBytes: what each token stands for, where decoding is concatenation (byte-level BPE, SentencePiece)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class TokenBytes(dict[int, bytes]):
    """Token id -> the bytes it stands for, filled as tokens are met. Unknown ids stand for nothing."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        super().__init__()
        self._bytes_of = bytes_of

    def __missing__(self, token_id: int) -> bytes:
        value = self[token_id] = self._bytes_of(token_id)
        return value


def byte_of_unicode() -> dict[str, int]:
    """Return the printable character that byte-level BPE writes for each byte, inverted.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), 2019: printable bytes stand
    for themselves, the others for characters from U+0100 on, in order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_UNICODE = byte_of_unicode()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_UNICODE[char] for char in token])
    except KeyError:  # an added token: written as it is
        return token.encode()


@dataclass
class Concatenation:
    """How a tokenizer that decodes by concatenation turns one token into bytes."""

    token_to_bytes: Callable[[str], bytes]
    strip_start: Callable[[bytes], bytes] | None = None


@dataclass
class _SentencePiece:
    replacements: list[tuple[str, str]] = field(default_factory=list)
    byte_fallback: bool = False

    def token_to_bytes(self, token: str) -> bytes:
        if self.byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass  # only looks like a byte
        for old, new in self.replacements:
            token = token.replace(old, new)
        return token.encode()


def read_decoder(decoder: dict[str, Any] | None) -> Concatenation | None:
    """Understand the `decoder` of a tokenizer.json; None if it does not decode by concatenation."""
    if decoder is None:
        return None
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return Concatenation(_byte_level)
    return _read_sentencepiece(steps)


def _read_sentencepiece(steps: list[dict[str, Any]]) -> Concatenation | None:
    pieces, strip_start, fused = _SentencePiece(), None, False
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if not fused:
                pieces.replacements.append((old, new))
            case {"type": "ByteFallback"} if not fused:
                pieces.byte_fallback = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": str(char), "start": int(start), "stop": 0} if fused and len(char) == 1:
                strip_start = _strip_up_to(char.encode(), start)
            case {"type": "Metaspace", "replacement": str(mark), "prepend_scheme": str(scheme)} if len(steps) == 1:
                pieces.replacements.append((mark, " "))
                # The decoder drops every mark of the first token.
                strip_start = (lambda data: data.replace(b" ", b"")) if scheme != "never" else None
            case _:
                return None
    return Concatenation(pieces.token_to_bytes, strip_start)


def _strip_up_to(char: bytes, count: int) -> Callable[[bytes], bytes]:
    def strip(data: bytes) -> bytes:
        for _ in range(count):
            data = data.removeprefix(char)
        return data

    return strip
