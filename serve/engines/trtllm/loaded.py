"""Loaded: TensorRT-LLM's object with all that is fixed about it, and the calls that are made on it."""

import asyncio
import atexit
import json
import logging
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from serve.artifacts.node_probe import probe_node
from serve.core.parallel import ParallelLayout
from serve.core.request import GenerateRequest, SamplingParams, pack_tokens
from serve.engines.protocol import EngineInfo
from serve.engines.trtllm.arguments import EnginePlan, choose_backend, plan_engine
from serve.engines.trtllm.chain_seeds import ChainSeeds, private_salt
from serve.engines.trtllm.construct import construct
from serve.engines.trtllm.daemon_threads import Errands, call_in_thread
from serve.engines.trtllm.engine_info import Limits, check_capacity, engine_info, engine_limits
from serve.engines.trtllm.failures import classify
from serve.engines.trtllm.flights import Flight
from serve.engines.trtllm.jit_caches import CacheOrigin, origin_of, with_caches
from serve.engines.trtllm.kv_events import EventTranslator
from serve.engines.trtllm.library import Library, load_library, make_sampling_params
from serve.engines.trtllm.line import Backend, detect
from serve.engines.trtllm.model_directory import read_model_directory
from serve.engines.trtllm.orchestration import Orchestration
from serve.engines.trtllm.sampling import SamplingSupport, sampling_keywords, sampling_support
from serve.engines.trtllm.settings import TrtllmSettings
from serve.engines.trtllm.startup import Progress, claim_process, construct_in_thread, shut_down_in_thread
from serve.engines.trtllm.stats import read_record
from serve.engines.trtllm.stream import OutputReader
from serve.errors import ConfigError, EngineDead, RequestError

_log = logging.getLogger(__name__)

_CAPACITY_S = 5.0  # how long the size of the KV cache may take to be told after the first request
_WARM_UP = GenerateRequest("warm up", "", pack_tokens([0]), SamplingParams(temperature=0.0, max_tokens=1))


@dataclass
class Loaded:
    """One LLM object.

    Attributes:
        llm: The object.
        plan: How it was made.
        limits: What requests have to fit.
        info: What the engine says of itself.
        library: Classes of TensorRT-LLM.
        support: What requests can ask for.
        seeds: Whose KV blocks the engine holds.
        translator: Of its KV events.
        errands: Where requests are aborted: that may block.
    """

    llm: Any
    plan: EnginePlan
    limits: Limits
    info: EngineInfo
    library: Library
    support: SamplingSupport
    seeds: ChainSeeds
    translator: EventTranslator
    errands: Errands

    def submit(self, name: str, request: GenerateRequest, keywords: dict[str, Any]) -> Flight:
        """Give the engine a request that was checked.

        Raises:
            RequestError: TensorRT-LLM refuses it.
            EngineDead: TensorRT-LLM is gone.
        """
        prompt = request.prompt_array()
        salt = request.cache_salt
        if request.sampling.prompt_logprobs is not None:
            salt = private_salt()  # logits of reused blocks are not computed, and would be missing
        options = {"cache_salt": salt} if salt else {}
        self.seeds.begin(name, prompt, salt)
        submitted_s = time.monotonic()
        try:
            params = make_sampling_params(self.library, keywords, self.info.vocab_size)
            output = self.llm.generate_async(prompt.tolist(), sampling_params=params, streaming=True, **options)
        except Exception as exc:
            self.seeds.end(name, submitted_s)
            raise self.translated(exc, is_argument_check=isinstance(exc, ValueError | TypeError)) from exc
        return Flight(name, request, output, OutputReader(request.sampling, keywords["end_id"], submitted_s))

    def abort(self, flight: Flight) -> None:
        """Tell the engine to end a request, from a thread."""

        def run() -> None:
            try:
                flight.output.abort()
            except Exception as exc:  # a dead engine, or a request that has just ended
                _log.debug("Aborting request %s: %s: %s", flight.request.request_id, type(exc).__name__, exc)

        self.errands.send(run)

    def translated(self, error: Exception, *, is_argument_check: bool = False) -> RequestError | EngineDead:
        """Turn an exception of TensorRT-LLM into one of ours."""
        is_request_error = is_argument_check or isinstance(error, self.library.request_error)
        failure = classify(error, is_request_error=is_request_error)
        if failure.is_fatal:
            return EngineDead(f"TensorRT-LLM failed: {failure.message}")
        return RequestError(failure.message, None, failure.code)

    async def probe(self) -> None:
        """Generate one token.

        Raises:
            RequestError, EngineDead: The engine could not.
        """
        flight = self.submit("probe", _WARM_UP, sampling_keywords(_WARM_UP, self.support, 0))
        try:
            async for _ in flight.output:
                pass
        except Exception as exc:
            raise self.translated(exc) from exc
        finally:
            self.seeds.end("probe", time.monotonic())


async def load(
    model_dir: Path, settings: TrtllmSettings, layout: ParallelLayout, orchestration: Orchestration
) -> Loaded:
    """Make the LLM object, generate one token, and find out the size of its KV cache.

    Raises:
        ConfigError, BundleMismatch, EngineDead: As `TrtllmEngine.start` says.
    """
    installation = detect()
    model = read_model_directory(model_dir)
    if choose_backend(settings, model, installation.line) is Backend.PYTORCH:
        origin = partial(_origin, installation.version)
        settings = with_caches(settings, model.path, origin, _private_directory)
    plan = plan_engine(settings, layout, orchestration, model, installation.line, installation.version)
    limits = engine_limits(plan, settings, json.loads((model.path / "config.json").read_text()))
    claim_process()
    for note in plan.notes:
        _log.warning("%s", note)
    progress = Progress(settings.start_timeout_s)
    llm = await construct_in_thread(lambda: construct(plan), progress, settings.start_timeout_s)
    errands = Errands("trtllm-abort")
    try:
        library = load_library()
        support = sampling_support(plan, settings, library.sampling_fields)
        seeds = ChainSeeds(limits.tokens_per_block, library.blake3)
        info = engine_info(installation.version, plan, limits, total_blocks=1)
        translator = EventTranslator(limits.tokens_per_block, seeds)
        loaded = Loaded(llm, plan, limits, info, library, support, seeds, translator, errands)
        await _warm_up(loaded, max(1.0, settings.start_timeout_s - progress.elapsed_s))
        total_blocks = await _ask_capacity(loaded, settings)
        loaded.info = engine_info(installation.version, plan, limits, total_blocks)
        warning = check_capacity(settings, limits, total_blocks)
    except BaseException:
        errands.stop()
        await shut_down_in_thread(llm, settings.stop_timeout_s)
        raise
    if warning:
        _log.warning("%s", warning)
    _log.info("TensorRT-LLM %s started in %.0f s. %s", installation.version, progress.elapsed_s, _metrics(llm))
    return loaded


def _origin(version: str) -> CacheOrigin:
    return origin_of(version, probe_node())


def _private_directory() -> Path:
    """Return a directory that this process may make, and that goes with it."""
    parent = Path(tempfile.mkdtemp(prefix="raytrt-caches-"))
    atexit.register(shutil.rmtree, parent, ignore_errors=True)
    return parent / "jit"


async def _warm_up(loaded: Loaded, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await loaded.probe()
    except TimeoutError:
        raise EngineDead(f"TensorRT-LLM was made, but did not generate one token in {timeout_s:.0f} s") from None
    except RequestError as exc:
        raise ConfigError(f"engine: TensorRT-LLM was made, but refuses the simplest request: {exc}") from exc


async def _ask_capacity(loaded: Loaded, settings: TrtllmSettings) -> int:
    try:
        async with asyncio.timeout(4 * _CAPACITY_S):
            return await call_in_thread(lambda: _total_blocks(loaded, settings), "trtllm-capacity")
    except TimeoutError:
        raise EngineDead("TensorRT-LLM was made, but does not answer how large its KV cache is") from None


def _total_blocks(loaded: Loaded, settings: TrtllmSettings) -> int:
    """Ask for the size of the KV cache in the ways that the lines have. Blocks; after the first request only."""
    llm, deadline_s = loaded.llm, time.monotonic() + _CAPACITY_S
    with suppress(Exception):
        if (blocks := int(llm.get_kv_cache_capacity()["maxNumBlocks"])) > 0:
            return blocks
    has_events = bool(settings.kv_cache.event_buffer and settings.kv_cache.block_reuse)
    while time.monotonic() < deadline_s:
        for record in llm.get_stats(timeout=0.05) or ():
            if blocks := read_record(json.loads(record) if isinstance(record, str) else record).total_blocks or 0:
                return blocks
        if has_events:
            loaded.translator.translate(llm.get_kv_cache_events(timeout=0.05) or ())  # nothing is cached yet
            if loaded.translator.pool_blocks:
                return loaded.translator.pool_blocks[0]
    blocks = -(-(settings.kv_cache.max_tokens or loaded.limits.context_tokens) // loaded.limits.tokens_per_block)
    _log.warning("TensorRT-LLM does not tell the size of its KV cache; taking it for %d blocks.", blocks)
    return blocks


def _metrics(llm: Any) -> str:
    """Return what the newest line measured of its start; empty for others."""
    metrics = getattr(llm, "startup_metrics", None)
    return f"Startup metrics: {metrics}" if isinstance(metrics, dict) and metrics else ""
