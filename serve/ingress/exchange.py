"""Exchange: one HTTP request and its answer, on raw ASGI.

A framework's request and response objects cost more per streamed token than the token itself; what is needed of them
is little.
"""

import os
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from serve.ingress.api_error import ApiError, printable

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

_SANE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
_JSON_TYPE = re.compile(rb"application/([\w.+-]+\+)?json *(;.*)?", re.IGNORECASE | re.DOTALL)
_JSON: Headers = [(b"content-type", b"application/json")]
_SSE: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events
]


class ClientGone(Exception):
    """The client closed the connection; nobody waits for an answer."""


class Exchange:
    """One request and its answer.

    Attributes:
        method, path: Of the request; the path without the prefix that the application is mounted at.
        trace_id: Random; unique, unlike `request_id`.
        request_id: Taken from the client's x-request-id if it is sane, else `trace_id`.
        wants_timing: Whether x-raytrt-timing asks for timestamps in a stream.
        wants_explanation: Whether x-raytrt-explain asks how the request was routed.
        started_s: `time.monotonic()` when the request was seen.
        status: Of the answer; 0 as long as none was sent.
        model, endpoint: Labels for metrics and logs; set by the handler.
        fallback: What serves the model in the place of what was configured; set by the handler.
        bundle: Fingerprint of the bundle that serves it, if it is one; set by the handler.
        replicas: Those that serve it, if it wants an explanation; set by the handler.
    """

    __slots__ = (
        "_content_length",
        "_content_type",
        "_ended",
        "_headers",
        "_raw_send",
        "bundle",
        "endpoint",
        "fallback",
        "method",
        "model",
        "path",
        "receive",
        "replicas",
        "request_id",
        "started_s",
        "status",
        "trace_id",
        "wants_explanation",
        "wants_timing",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the request's line and headers."""
        self.started_s = time.monotonic()
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        if (root := scope.get("root_path", "")) and self.path.startswith(root):
            self.path = self.path[len(root) :] or "/"
        self.receive = receive
        self._raw_send = send
        self.trace_id = os.urandom(12).hex()
        self.request_id = self.trace_id
        self.wants_timing = False
        self.wants_explanation = False
        self._content_type: bytes | None = None
        self._content_length: bytes | None = None
        self.status = 0
        self._ended = False
        self.model = ""
        self.fallback = ""
        self.bundle = ""
        self.endpoint = ""
        self.replicas = ""
        self._headers: Headers = scope["headers"]
        for name, value in self._headers:
            if name == b"content-type":
                self._content_type = value
            elif name == b"content-length":
                self._content_length = value
            elif name == b"x-request-id":
                if _SANE_REQUEST_ID.fullmatch(value):
                    self.request_id = value.decode("ascii")
            elif name == b"x-raytrt-timing":
                self.wants_timing = value == b"1"
            elif name == b"x-raytrt-explain":
                self.wants_explanation = value == b"1"

    def label(self, header: str) -> str:
        """Return a header of the client's choice as text that is safe to show and to log; empty if there is none."""
        wanted = header.encode("ascii")
        for name, value in self._headers:
            if name == wanted:
                return printable(value.decode("utf-8", "replace").strip())
        return ""

    async def read_json(self, max_bytes: int) -> bytes:
        """Return the body of a request that should hold JSON.

        Raises:
            ApiError: It is too long (413), or of another type (415).
            ClientGone: It did not arrive.
        """
        if self._content_type is not None and not _JSON_TYPE.fullmatch(self._content_type.strip()):
            raise ApiError(415, "The body has to be JSON: set the header Content-Type: application/json.")
        if self._content_length is not None and self._content_length.isdigit():
            _check_length(int(self._content_length[:20]), max_bytes)
        message = await self.receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            body: bytes = message.get("body", b"")
            _check_length(len(body), max_bytes)
            return body
        return await self._read_rest(message, max_bytes)

    async def _read_rest(self, message: Message, max_bytes: int) -> bytes:
        parts, length = [], 0
        while True:
            if message["type"] == "http.disconnect":
                raise ClientGone
            part: bytes = message.get("body", b"")
            length += len(part)
            _check_length(length, max_bytes)
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)
            message = await self.receive()

    async def _send(self, message: Message) -> None:
        try:
            await self._raw_send(message)
        except OSError as exc:  # ASGI 2.4: the connection is closed
            raise ClientGone from exc

    def _head(self, headers: Headers) -> Headers:
        elapsed_ms = (time.monotonic() - self.started_s) * 1000
        return [
            *headers,
            (b"x-request-id", self.request_id.encode("ascii")),
            (b"x-response-time", b"%.3fms" % elapsed_ms),
            *([(b"x-raytrt-fallback", self.fallback.encode("ascii", "replace"))] if self.fallback else ()),
            *([(b"x-raytrt-bundle", self.bundle.encode("ascii", "replace"))] if self.bundle else ()),
            *([(b"x-raytrt-replica", self.replicas.encode("ascii", "replace"))] if self.replicas else ()),
        ]

    async def send_json(self, body: bytes, status: int = 200, headers: Headers = _JSON) -> None:
        """Send a whole answer."""
        self.status = status
        head = [*self._head(headers), (b"content-length", b"%d" % len(body))]
        await self._send({"type": "http.response.start", "status": status, "headers": head})
        self._ended = True
        await self._send({"type": "http.response.body", "body": b"" if self.method == "HEAD" else body})

    async def start_events(self) -> None:
        """Send the head of a stream of server-sent events."""
        self.status = 200
        await self._send({"type": "http.response.start", "status": 200, "headers": self._head(_SSE)})

    async def send_events(self, data: bytes) -> None:
        """Send events that are encoded already; waits while the client is slow."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end_events(self, data: bytes) -> None:
        """Send the last events of a stream."""
        self._ended = True
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def send_error(self, error: ApiError) -> None:
        """Send an error: as the answer, or as the last event of a stream that has begun."""
        if self.status == 0:
            await self.send_json(error.body(), error.status, [*_JSON, *error.headers()])
        elif not self._ended:
            # Without `[DONE]`, which says that a stream is complete.
            await self.end_events(b"data: " + error.body() + b"\n\n")


Handler = Callable[[Exchange], Awaitable[None]]


def _check_length(length: int, max_bytes: int) -> None:
    if length > max_bytes:
        raise ApiError(
            413, f"The body is longer than {max_bytes} bytes, the limit of this gateway.", code="body_too_large"
        )
