"""ScriptedEngine: an engine of which a test decides every step."""

import asyncio
from collections.abc import AsyncGenerator

from serve.core.kv_events import KvEventBatch, KvLedger, KvStored
from serve.core.request import FinishReason, GenerateRequest, PrefillInfo, TokenDelta
from serve.engines.protocol import EngineInfo, EngineStats
from serve.errors import EngineDead, RequestError

INFO = EngineInfo("scripted 1", 4096, 1000, 16, 256, "none")


class ScriptedEngine:
    """Each `step` gives every sequence one token, in the same turn of the loop."""

    def __init__(self, start_error: Exception | None = None, kv_lag: int = 1024) -> None:
        self.start_error = start_error
        self.sick: str | None = None
        self.stopped = asyncio.Event()
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.may_close = asyncio.Event()
        self.may_close.set()
        self.ledger = KvLedger(kv_lag)
        self.sequences: dict[str, asyncio.Queue[TokenDelta | Exception]] = {}
        self.closed: list[str] = []
        self._steps = 0

    @property
    def info(self) -> EngineInfo:
        return INFO

    async def start(self) -> None:
        await self.may_start.wait()
        if self.start_error is not None:
            raise self.start_error

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        if request.request_id in self.sequences:
            raise RequestError(f"request_id: {request.request_id!r} is in flight", "request_id")
        queue = self.sequences[request.request_id] = asyncio.Queue()
        try:
            while True:
                told = await queue.get()
                if isinstance(told, Exception):
                    raise told
                yield told
        finally:
            await self.may_close.wait()
            del self.sequences[request.request_id]
            self.closed.append(request.request_id)

    def step(self, finish: bool = False) -> None:
        """Generate one token for every sequence."""
        self._steps += 1
        reason = FinishReason.LENGTH if finish else None
        prefill = PrefillInfo() if self._steps == 1 else None
        for queue in self.sequences.values():
            queue.put_nowait(TokenDelta((self._steps,), reason, prefill=prefill))

    def store(self, first: int, count: int = 1) -> None:
        """Cache blocks, one change each."""
        for block in range(first, first + count):
            self.ledger.record([KvStored((block,), block - 1)])

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self.sequences), total_blocks=256, generated_tokens=self._steps)

    def kv_events(self) -> AsyncGenerator[KvEventBatch, None]:
        return self.ledger.read()

    def check_health(self) -> None:
        if self.sick is not None:
            raise EngineDead(self.sick)

    async def stop(self) -> None:
        self.sick = self.sick or "the engine was stopped"
        for queue in self.sequences.values():
            queue.put_nowait(EngineDead(self.sick))
        self.stopped.set()
