"""A replica without Ray: `python -m tests.integration.event_plane_replica NAME`, to be killed.

Prints one line of JSON: its metadata, and the port of its requests. A connection is one request and its answer: a
GenerateRequest, and the number of tokens that it brought; or of the model "content", and all that is in the cache.
"""

import asyncio
import json
import sys
from contextlib import aclosing

import msgspec
import uvloop

from serve.core.request import GenerateRequest, decode_request
from serve.engines.simulated.engine import SimulatedEngine
from serve.engines.simulated.settings import FixedLatencySettings, SimulatedSettings
from serve.errors import EngineDead
from serve.router.publisher import EventPublisher

HOST = "127.0.0.1"
SETTINGS = SimulatedSettings(
    latency=FixedLatencySettings(prefill_tokens_per_s=2e5, decode_step_s=0.002),
    total_blocks=160,
    context_tokens=2000,
    tokens_per_block=16,
)


async def run(engine: SimulatedEngine, publisher: EventPublisher, request: GenerateRequest) -> int:
    """Run a sequence as a replica does; return how many tokens it brought."""
    tokens = 0
    publisher.accepted(request)
    try:
        async with aclosing(engine.generate(request)) as deltas:
            async for delta in deltas:
                publisher.delta(request, delta)
                tokens += len(delta.token_ids)
    finally:
        publisher.ended(request)
    return tokens


async def send(port: int, request: GenerateRequest) -> bytes:
    """Send a request to a replica, and return its answer.

    Raises:
        EngineDead: It is gone.
    """
    try:
        reader, writer = await asyncio.open_connection(HOST, port)
        try:
            writer.write(msgspec.msgpack.encode(request))
            writer.write_eof()
            answer = await reader.read()
        finally:
            writer.close()
    except OSError as exc:
        raise EngineDead(str(exc)) from exc
    if not answer:
        raise EngineDead("no answer")
    return answer


async def main(name: str) -> None:
    """Serve until killed."""
    engine = SimulatedEngine(SETTINGS)
    await engine.start()
    publisher = EventPublisher(name, HOST, engine)
    await publisher.start()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = decode_request(await reader.read())
        if request.model == "content":
            writer.write(msgspec.msgpack.encode(sorted(engine.cache_content())))
        else:
            writer.write(msgspec.msgpack.encode(await run(engine, publisher, request)))
        writer.close()

    server = await asyncio.start_server(connected, HOST, 0)
    print(json.dumps([publisher.metadata(), server.sockets[0].getsockname()[1]]), flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
