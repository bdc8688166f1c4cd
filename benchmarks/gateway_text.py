"""What the gateway's own layer costs: parse, template, tokenize, detokenize, write. No server, no Ray, no engine.

    python -m benchmarks.gateway_text [--model serve/models/quickstart] [--profile]

The application is called as an ASGI server calls it, with a backend that answers at once, so that what is measured is
CPU time of this layer alone. Ends with one JSON line a figure.
"""

import argparse
import asyncio
import cProfile
import json
import pstats
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from pathlib import Path
from typing import Any

from serve.core.request import FinishReason, GenerateRequest, PrefillInfo, TokenDelta
from serve.ingress.api import GatewayApp, make_app
from serve.ingress.backend import ModelReadiness
from serve.ingress.models import ServedModel, load_model
from serve.ingress.routing_desk import RoutingDesk
from serve.ingress.settings import GatewaySettings
from serve.router.hints import NO_HINTS, RouteHints

QUICKSTART = Path(__file__).parent.parent / "serve" / "models" / "quickstart"
QUESTION = "How do I serve a model on 8 GPUs?"

Figure = tuple[str, float, str, float | None]  # name, value, unit, what it must not exceed


class InstantBackend:
    """Answers with the same token again and again, one a delta, without waiting."""

    def __init__(self, tokens: tuple[int, ...]) -> None:
        self._deltas = [TokenDelta((token,)) for token in tokens]
        self.desk = RoutingDesk({})

    async def generate(
        self, request: GenerateRequest, hints: RouteHints = NO_HINTS
    ) -> AsyncGenerator[TokenDelta, None]:
        """See `Backend.generate`."""
        count = request.sampling.max_tokens
        yield TokenDelta(self._deltas[0].token_ids, prefill=PrefillInfo(), finish_reason=_end(count == 1))
        for number in range(1, count):
            delta = self._deltas[number % len(self._deltas)]
            yield delta if number < count - 1 else TokenDelta(delta.token_ids, finish_reason=FinishReason.LENGTH)

    def fallbacks(self) -> dict[str, str]:
        """See `Backend.fallbacks`."""
        return {}

    async def readiness(self) -> list[ModelReadiness]:
        """See `Backend.readiness`."""
        return []


def _end(ended: bool) -> FinishReason | None:
    return FinishReason.LENGTH if ended else None


async def call(app: GatewayApp, path: str, body: bytes) -> int:
    """Send one request as a server would; return the bytes of the answer."""
    received, size, status = False, 0, 0
    forever: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    async def receive() -> dict[str, Any]:
        nonlocal received
        if received:
            return await forever
        received = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        nonlocal size, status
        size += len(message.get("body", b""))
        status = message.get("status", status)

    headers = [(b"host", b"x"), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await app({"type": "http", "method": "POST", "path": path, "headers": headers}, receive, send)
    assert status == 200, status
    return size


def measure(run: Callable[[], Coroutine[Any, Any, Any]], repeats: int, units: int, rounds: int = 5) -> float:
    """Return CPU microseconds for each unit: the best of several rounds, for a machine that others share."""

    async def once() -> float:
        await run()
        start_s = time.process_time()
        for _ in range(repeats):
            await run()
        return (time.process_time() - start_s) / (repeats * units) * 1e6

    return min(asyncio.run(once()) for _ in range(rounds))


def chat_body(model: ServedModel, **fields: Any) -> bytes:
    """Return the body of a chat request with a short prompt."""
    return json.dumps({"model": model.id, "messages": [{"role": "user", "content": QUESTION}], **fields}).encode()


def report(figures: list[Figure]) -> None:
    """Print a table for people, and a JSON line a figure for machines."""
    for name, value, unit, hold in figures:
        print(f"{name:40} {value:8.1f} {unit:12}" + (f" hold <= {hold:g}" if hold is not None else ""))
    for name, value, unit, hold in figures:
        line: dict[str, Any] = {"name": name, "value": round(value, 2), "unit": unit}
        print(json.dumps(line if hold is None else line | {"hold": hold, "ok": value <= hold}))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=QUICKSTART, help="directory with a tokenizer")
    parser.add_argument("--profile", action="store_true", help="print where the time goes instead")
    options = parser.parse_args()
    model = load_model("model", options.model)
    tokens = memoryview(model.text.encode(QUESTION, add_special_tokens=False, room=10**6, param="prompt")).cast("I")
    app = make_app([model], InstantBackend(tuple(tokens)), GatewaySettings)
    chat, count = "/v1/chat/completions", 1000
    unary = chat_body(model, max_tokens=1)
    streamed = chat_body(model, max_tokens=count, stream=True)
    stopped = chat_body(model, max_tokens=count, stream=True, stop=["\n\n", "User:"])
    scored = chat_body(model, max_tokens=count, stream=True, logprobs=True)
    if options.profile:
        profile = cProfile.Profile()
        for body, repeats in ((unary, 2000), (streamed, 20)):
            profile.enable()
            asyncio.run(_repeat(app, chat, body, repeats))
            profile.disable()
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)
            profile = cProfile.Profile()
        return
    figures: list[Figure] = [
        ("gateway_unary_chat", measure(lambda: call(app, chat, unary), 500, 1), "us/request", 350.0),
        ("gateway_streamed_token", measure(lambda: call(app, chat, streamed), 5, count), "us/token", 20.0),
        ("gateway_streamed_token_with_stops", measure(lambda: call(app, chat, stopped), 5, count), "us/token", None),
        ("gateway_streamed_token_with_logprobs", measure(lambda: call(app, chat, scored), 5, count), "us/token", None),
    ]
    report(figures)


async def _repeat(app: GatewayApp, path: str, body: bytes, repeats: int) -> None:
    for _ in range(repeats):
        await call(app, path, body)


if __name__ == "__main__":
    main()
