"""ScriptedLlm: an LLM object of which a test decides every response, and an engine around it."""

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from serve.core.parallel import ParallelLayout
from serve.engines.trtllm.arguments import plan_engine
from serve.engines.trtllm.chain_seeds import ChainSeeds
from serve.engines.trtllm.daemon_threads import Errands
from serve.engines.trtllm.engine import TrtllmEngine
from serve.engines.trtllm.engine_info import engine_info, engine_limits
from serve.engines.trtllm.kv_events import EventTranslator
from serve.engines.trtllm.library import Library
from serve.engines.trtllm.line import Line
from serve.engines.trtllm.loaded import Loaded
from serve.engines.trtllm.model_directory import ModelDirectory
from serve.engines.trtllm.orchestration import Orchestration
from serve.engines.trtllm.sampling import sampling_support
from serve.engines.trtllm.settings import TrtllmSettings

FIELDS = frozenset({"prompt_ignore_length"})


class LibraryRequestError(RuntimeError):
    """Stands for TensorRT-LLM's."""


class RequestOutput:
    """One object for the life of a request, changed in place."""

    def __init__(self) -> None:
        self.outputs = [SimpleNamespace(token_ids=[], logprobs=None, finish_reason=None, stop_reason=None)]
        self.cached_tokens = 0
        self.context_logits: Any = None
        self.responses: asyncio.Queue[Any] = asyncio.Queue()
        self.aborted_by: list[str] = []

    def respond(self, *tokens: int, finish: str | None = None) -> None:
        self.responses.put_nowait((tokens, finish))

    def fail(self, error: Exception) -> None:
        self.responses.put_nowait(error)

    def abort(self) -> None:
        self.aborted_by.append(threading.current_thread().name)

    def __aiter__(self) -> AsyncIterator["RequestOutput"]:
        return self

    async def __anext__(self) -> "RequestOutput":
        if self.outputs[0].finish_reason is not None:
            raise StopAsyncIteration
        response = await self.responses.get()
        if isinstance(response, Exception):
            raise response
        tokens, self.outputs[0].finish_reason = response
        self.outputs[0].token_ids.extend(tokens)
        return self


@dataclass
class ScriptedLlm:
    """What a `TrtllmEngine` calls of an LLM object."""

    refusal: Exception | None = None
    is_well: bool = True
    asked: list[tuple[list[int], Any, dict[str, Any]]] = field(default_factory=list)
    outputs: list[RequestOutput] = field(default_factory=list)
    shutdowns: int = 0

    def generate_async(self, inputs: list[int], *, sampling_params: Any, streaming: bool, **options: Any) -> Any:
        assert streaming
        if self.refusal is not None:
            raise self.refusal
        self.asked.append((inputs, sampling_params, options))
        self.outputs.append(RequestOutput())
        return self.outputs[-1]

    def get_stats(self, timeout: float) -> list[Any]:
        return []

    def get_kv_cache_events(self, timeout: float) -> list[Any]:
        return []

    def _check_health(self) -> bool:
        return self.is_well

    def shutdown(self) -> None:
        self.shutdowns += 1


def make_engine(llm: ScriptedLlm, **settings: Any) -> TrtllmEngine:
    """Make an engine that loads `llm`."""
    chosen = TrtllmSettings.model_validate({"max_batch_size": 4, **settings})

    async def load(model: Path, settings: TrtllmSettings, layout: ParallelLayout, ranks: Orchestration) -> Loaded:
        plan = plan_engine(settings, layout, ranks, ModelDirectory(model), Line.NEWEST)
        limits = engine_limits(plan, settings, {"vocab_size": 100, "max_position_embeddings": 512})
        seeds = ChainSeeds(limits.tokens_per_block)
        library = Library(lambda **keywords: keywords, FIELDS, LibraryRequestError, None)
        support = sampling_support(plan, settings, FIELDS)
        info = engine_info("1.4", plan, limits, total_blocks=8)
        translator = EventTranslator(limits.tokens_per_block, seeds)
        return Loaded(llm, plan, limits, info, library, support, seeds, translator, Errands("trtllm-abort"))

    return TrtllmEngine(Path("/models/m"), chosen, ParallelLayout(), Orchestration(), load=load)
