"""A load generator that costs little itself: raw HTTP/1.1 on uvloop, a C parser, one object a stream."""

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import httptools
import msgspec


class _Timing(msgspec.Struct):
    emitted_s: float = 0.0
    queue_s: float | None = None
    prefill_s: float | None = None


class _Details(msgspec.Struct, frozen=True):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details = _Details()


class _Choice(msgspec.Struct):
    text: str = ""
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    raytrt: _Timing | None = None


_decode = msgspec.json.Decoder(_Chunk).decode


@dataclass
class StreamRecord:
    """What one request brought. Times are `time.monotonic()` of this machine.

    Attributes:
        sent_s: When the request was written.
        arrivals: For each chunk with text: (arrival, emission in the engine).
        pieces: The text.
        status, usage_tokens, complete: HTTP status, completion tokens by the usage chunk, whether [DONE] came.
        cached_tokens: Prompt tokens that were cached, by the usage chunk.
        engine_ttft_s: The engine's own time to first token: its queue and prefill.
    """

    sent_s: float = 0.0
    arrivals: list[tuple[float, float]] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    status: int = 0
    usage_tokens: int = 0
    complete: bool = False
    cached_tokens: int = 0
    engine_ttft_s: float = 0.0
    body: bytes = b""

    @property
    def ttft_s(self) -> float:
        """Time to first token as the client sees it."""
        return self.arrivals[0][0] - self.sent_s


class Connection(asyncio.Protocol):
    """One keep-alive connection; one request at a time."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._parser: Any = None
        self._buffer = b""
        self._done: asyncio.Future[None] | None = None
        self._now_s = 0.0
        self.record = StreamRecord()
        self._is_stream = False
        self.reusable = True

    @classmethod
    async def open(cls, port: int, host: str = "127.0.0.1") -> "Connection":
        """Connect."""
        _, connection = await asyncio.get_running_loop().create_connection(cls, host, port)
        return connection

    async def renewed(self, port: int) -> "Connection":
        """Return this connection, or a new one if the server has closed it or is about to."""
        return self if self.reusable else await self.open(port)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError("the server closed the connection"))

    def close(self) -> None:
        """Hang up."""
        self._transport.close()

    async def request(self, path: str, body: dict[str, Any], headers: str = "x-raytrt-timing: 1\r\n") -> StreamRecord:
        """POST a body and read the whole answer."""
        payload = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}"
        self.record, self._buffer = StreamRecord(), b""
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        self.record.sent_s = time.monotonic()
        self._transport.write(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
        await self._done
        return self.record

    def data_received(self, data: bytes) -> None:
        self._now_s = time.monotonic()
        self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self._is_stream = value.startswith(b"text/event-stream")

    def on_body(self, body: bytes) -> None:
        if not self._is_stream:
            self.record.body += body
            return
        *events, self._buffer = (self._buffer + body).split(b"\n\n")
        for event in events:
            self._on_event(event.removeprefix(b"data: "))

    def on_message_complete(self) -> None:
        self.record.status = self._parser.get_status_code()
        self.reusable = self.reusable and self._parser.should_keep_alive()
        assert self._done is not None
        if not self._done.done():
            self._done.set_result(None)

    def _on_event(self, event: bytes) -> None:
        record = self.record
        if event == b"[DONE]":
            record.complete = True
            return
        chunk = _decode(event)
        timing = chunk.raytrt
        if chunk.usage is not None:
            record.usage_tokens = chunk.usage.completion_tokens
            record.cached_tokens = chunk.usage.prompt_tokens_details.cached_tokens
        if timing is not None and timing.prefill_s is not None:
            record.engine_ttft_s = (timing.queue_s or 0.0) + timing.prefill_s
        if chunk.choices and chunk.choices[0].text:
            record.pieces.append(chunk.choices[0].text)
            record.arrivals.append((self._now_s, timing.emitted_s if timing is not None else 0.0))


def completion(model: str, max_tokens: int, prompt: str = "What is RayTRT?", *, stream: bool = True) -> dict[str, Any]:
    """Return the body of a /v1/completions request."""
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body
