"""Chaos: whatever becomes of messages, replicas and gateways, gateways soon know the truth, and no request fails."""

import asyncio
import contextlib
import itertools
import json
import math
import random
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec
import pytest

from serve.core.kv_events import KvEventBatch
from serve.core.request import GenerateRequest, SamplingParams, pack_tokens
from serve.engines.protocol import EngineStats
from serve.engines.simulated.engine import SimulatedEngine
from serve.router.publisher import EventPublisher
from serve.router.wire import PlaneAddress
from tests.integration import event_plane_replica
from tests.integration.event_plane_gateway import Gateway
from tests.integration.event_plane_relay import LossyRelay
from tests.integration.event_plane_replica import HOST, SETTINGS

REPLICAS, GATEWAYS, CLIENTS = 3, 2, 12
CHAOS_S = 4.0
CONVERGED_S = 2.0  # from the end of the chaos to all being known: what the product promises
SIZE = SETTINGS.tokens_per_block


def requests_of(rng: random.Random, client: int) -> "itertools.chain[GenerateRequest]":
    """Yield requests that share prefixes with those of other clients, and are more than all caches hold."""

    def one(number: int) -> GenerateRequest:
        family = rng.randrange(12)
        prompt = [family] * rng.choice([64, 200, 400]) + [rng.randrange(100) for _ in range(rng.randrange(1, 100))]
        sampling = SamplingParams(max_tokens=rng.randrange(1, 40))
        return GenerateRequest(f"{client}-{number}", "m", pack_tokens(prompt), sampling)

    return itertools.chain.from_iterable([one(number)] for number in itertools.count())


class Traffic:
    """Clients that send one request after the other, each to a random gateway, until told to end."""

    def __init__(self, rng: random.Random, gateways: list[Gateway]) -> None:
        self.sent = self.retried = 0
        self._rng = rng
        self._gateways = gateways
        self._ending = False
        self._clients = [asyncio.ensure_future(self._client(number)) for number in range(CLIENTS)]

    async def _client(self, number: int) -> None:
        for request in requests_of(self._rng, number):
            if self._ending:
                return
            tokens, attempts = await self._rng.choice(self._gateways).generate(request)
            assert tokens == request.sampling.max_tokens
            self.sent += 1
            self.retried += attempts > 1

    async def end(self) -> None:
        """Let every client finish; raises if a request failed."""
        self._ending = True
        await asyncio.gather(*self._clients)

    async def drop(self) -> None:
        """Leave nothing behind."""
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)


async def converged_s(gateways: list[Gateway], truth: dict[str, frozenset[int]]) -> float:
    """Wait until all gateways know the truth; return how long that took. Then check their indexes."""
    start_s = time.monotonic()
    await asyncio.gather(*(gateway.until(lambda gateway=gateway: gateway.knows(truth)) for gateway in gateways))  # type: ignore[misc]
    took_s = time.monotonic() - start_s
    for gateway in gateways:
        gateway.check_index(truth)
    print(f"converged after {took_s:.3f} s")
    return took_s


class LocalReplica:
    """A replica of this process, behind a bad network. Its engine can be replaced: that is a new epoch."""

    def __init__(self, name: str, relay: LossyRelay) -> None:
        self.relay = relay
        self.engine = SimulatedEngine(SETTINGS)
        self.info = self.engine.info
        self.publisher = EventPublisher(name, HOST, self)

    async def start(self) -> None:
        await self.engine.start()
        await self.publisher.start()
        assert self.publisher.address is not None
        self.relay.aim(self.publisher.address)

    async def restart(self) -> None:
        old, self.engine = self.engine, SimulatedEngine(SETTINGS)
        await self.engine.start()
        await old.stop()
        self._batches.put_nowait(None)

    async def stop(self) -> None:
        await self.publisher.stop()
        await self.engine.stop()

    def stats(self) -> EngineStats:
        return self.engine.stats()

    async def kv_events(self) -> AsyncGenerator[KvEventBatch, None]:
        batches = self._batches = asyncio.Queue[KvEventBatch | None]()
        reader = asyncio.ensure_future(self._read(self.engine, batches))
        try:
            while (batch := await batches.get()) is not None:
                yield batch
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
        raise ConnectionError("the engine is gone")

    async def _read(self, engine: SimulatedEngine, batches: "asyncio.Queue[KvEventBatch | None]") -> None:
        async for batch in engine.kv_events():
            batches.put_nowait(batch)


@asynccontextmanager
async def local_replicas(rng: random.Random, chaos: float) -> AsyncIterator[dict[str, LocalReplica]]:
    async with AsyncExitStack() as stack:
        replicas = {}
        for number in range(REPLICAS):
            relay = LossyRelay(rng, chaos)
            stack.push_async_callback(relay.close)
            await relay.start()
            replica = replicas[f"replica-{number}"] = LocalReplica(f"replica-{number}", relay)
            await replica.start()
            stack.push_async_callback(replica.stop)
        yield replicas


@pytest.mark.parametrize("seed", [1, 2])
async def test_gateways_converge_after_a_bad_network_and_restarts(seed: int) -> None:
    rng = random.Random(seed)
    async with local_replicas(rng, chaos=0.3) as replicas:

        async def send(name: str, request: GenerateRequest) -> int:
            return await event_plane_replica.run(replicas[name].engine, replicas[name].publisher, request)

        def make_gateway() -> Gateway:
            gateway = Gateway(SIZE, send)
            for name, replica in replicas.items():
                gateway.add(name, replica.relay.address)
            return gateway

        gateways = [make_gateway() for _ in range(GATEWAYS)]
        traffic = Traffic(rng, gateways)
        took_s = math.inf
        events = iter(["restart replica", "restart gateway", "cut", "restart replica"])  # and then whatever comes
        end_s = time.monotonic() + CHAOS_S
        try:
            while time.monotonic() < end_s:
                await asyncio.sleep(rng.random() * 0.4)  # the pace of the chaos; nothing is waited for
                replica = rng.choice(list(replicas.values()))
                match next(events, rng.choice(["restart replica", "restart gateway", "cut", "cut"])):
                    case "restart replica":
                        await replica.restart()
                    case "restart gateway":
                        number = rng.randrange(GATEWAYS)
                        gateways[number].subscriber.close()
                        gateways[number] = make_gateway()
                    case "cut":
                        replica.relay.cut()
            await traffic.end()
            for replica in replicas.values():
                replica.relay.calm()
            truth = {name: replica.engine.cache_content() for name, replica in replicas.items()}
            took_s = await converged_s(gateways, truth)
        finally:
            await traffic.drop()
            for gateway in gateways:
                gateway.subscriber.close()
        assert traffic.sent > 2 * CLIENTS
        assert sum(replica.relay.harmed for replica in replicas.values()) > 20
        assert any(truth.values())
        assert took_s <= CONVERGED_S


class ReplicaProcess:
    """A replica in a process of its own."""

    def __init__(self, name: str, process: Process, address: PlaneAddress, port: int) -> None:
        self.name = name
        self.process = process
        self.address = address
        self.port = port

    @classmethod
    async def start(cls, name: str) -> "ReplicaProcess":
        command = (sys.executable, "-m", "tests.integration.event_plane_replica", name)
        process = await asyncio.create_subprocess_exec(*command, stdout=PIPE)
        assert process.stdout is not None
        async with asyncio.timeout(60):
            metadata, port = json.loads(await process.stdout.readline())
        address = PlaneAddress.from_metadata(metadata)
        assert address is not None
        return cls(name, process, address, port)

    async def content(self) -> frozenset[int]:
        answer = await event_plane_replica.send(self.port, GenerateRequest("content", "content", b""))
        return frozenset(msgspec.msgpack.decode(answer))

    async def kill(self) -> None:
        """kill -9."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()


async def test_killed_replicas_are_replaced_and_no_request_fails() -> None:
    rng = random.Random(3)
    names = (f"replica-{number}" for number in itertools.count())
    started = await asyncio.gather(*(ReplicaProcess.start(next(names)) for _ in range(REPLICAS)))
    replicas = {replica.name: replica for replica in started}

    async def send(name: str, request: GenerateRequest) -> int:
        answer = await event_plane_replica.send(replicas[name].port, request)
        return msgspec.msgpack.decode(answer, type=int)

    def make_gateway() -> Gateway:
        gateway = Gateway(SIZE, send)
        for replica in replicas.values():
            gateway.add(replica.name, replica.address)
        return gateway

    gateways = [make_gateway() for _ in range(GATEWAYS)]
    traffic = Traffic(rng, gateways)
    try:
        for _ in range(3):
            await progress(traffic, 3 * CLIENTS)
            victim = rng.choice(list(replicas.values()))
            await victim.kill()
            await progress(traffic, CLIENTS)  # without anybody having told the gateways
            replacement = await ReplicaProcess.start(next(names))
            replicas[replacement.name] = replacement
            for gateway in gateways:
                gateway.add(replacement.name, replacement.address)
                gateway.remove(victim.name)
            del replicas[victim.name]
            number = rng.randrange(GATEWAYS)
            gateways[number].subscriber.close()
            gateways[number] = make_gateway()
        await progress(traffic, CLIENTS)
        await traffic.end()
        truth = {name: await replica.content() for name, replica in replicas.items()}
        took_s = await converged_s(gateways, truth)
        assert traffic.retried > 0
        assert any(truth.values())
    finally:
        await traffic.drop()
        for gateway in gateways:
            gateway.subscriber.close()
        await asyncio.gather(*(replica.kill() for replica in replicas.values()))
    assert took_s <= CONVERGED_S


async def progress(traffic: Traffic, requests: int) -> None:
    """Wait until so many more requests are answered."""
    enough = traffic.sent + requests
    async with asyncio.timeout(60):
        while traffic.sent < enough:  # noqa: ASYNC110  # clients announce nothing
            await asyncio.sleep(0.01)
