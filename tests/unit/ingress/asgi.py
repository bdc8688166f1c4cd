"""A client on raw ASGI: sees every message that the gateway sends, and can go away."""

import asyncio
import json
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from serve.ingress.api import GatewayApp


@dataclass
class Connection:
    """One request and what came back.

    Attributes:
        body: Parts of the request's body, sent one after the other.
        messages: What the gateway sent.
        on_message: Called with each; may go away.
        gate: Awaited before the gateway may send a body again: a slow client.
    """

    path: str = "/v1/chat/completions"
    body: Iterable[bytes] = ()
    headers: dict[str, str] = field(default_factory=dict)
    method: str = "POST"
    on_message: Callable[[MutableMapping[str, Any]], None] = lambda message: None
    messages: list[MutableMapping[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Prepare the body's parts."""
        self._parts = list(self.body) or [b""]
        self._broken = False
        self.gone = asyncio.Event()
        self.writable = asyncio.Event()
        self.writable.set()

    def drop_after(self, parts: int) -> None:
        """Close the connection after so many parts of the body, while more was announced."""
        del self._parts[parts:]
        self._broken = True
        self.go_away()

    def go_away(self) -> None:
        """Close the connection."""
        self.gone.set()

    async def receive(self) -> dict[str, Any]:
        """The server's side of ASGI."""
        if self._parts:
            return {"type": "http.request", "body": self._parts.pop(0), "more_body": bool(self._parts) or self._broken}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """The server's side of ASGI."""
        await self.writable.wait()
        self.messages.append(message)
        self.on_message(message)

    async def run(self, app: GatewayApp, raw_headers: list[tuple[bytes, bytes]] | None = None) -> "Connection":
        """Send the request and wait for the end of the answer."""
        headers = {"content-type": "application/json"} | self.headers
        encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers.items() if value]
        scope = {
            "type": "http",
            "method": self.method,
            "path": self.path,
            "headers": encoded if raw_headers is None else raw_headers,
        }
        await app(scope, self.receive, self.send)
        return self

    @property
    def unread_parts(self) -> int:
        """Parts of the request's body that the gateway did not ask for."""
        return len(self._parts)

    @property
    def status(self) -> int:
        """Of the answer."""
        status: int = self.messages[0]["status"]
        return status

    @property
    def answer_headers(self) -> dict[str, str]:
        """Of the answer."""
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def answer(self) -> bytes:
        """Its body."""
        return b"".join(message["body"] for message in self.messages[1:])

    @property
    def events(self) -> list[Any]:
        """The events of a stream; `[DONE]` is a string."""
        assert self.answer.endswith(b"\n\n")
        lines = self.answer.decode().removesuffix("\n\n").split("\n\n")
        assert all(line.startswith("data: ") for line in lines)
        data = [line.removeprefix("data: ") for line in lines]
        return [text if text == "[DONE]" else json.loads(text) for text in data]


async def post(app: GatewayApp, path: str, body: bytes | dict[str, Any], **headers: str) -> Connection:
    """Send a request and return what came back; names of headers have '_' for '-'."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await Connection(path, [data], named).run(app)
