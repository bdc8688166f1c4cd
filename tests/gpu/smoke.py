"""`python -m tests.gpu.smoke MODEL [--tensor N]`: one look at a TensorRT-LLM that is installed. Never run yet.

Prints a line for each thing that the adapter relies on and that only a real engine can show, with `ok` or `DIFFERS`,
and ends with 1 if anything differs.
"""

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from serve.core.parallel import ParallelLayout
from serve.core.request import GenerateRequest, SamplingParams, pack_tokens
from serve.engines.trtllm.block_key import block_keys
from serve.engines.trtllm.engine import TrtllmEngine
from serve.engines.trtllm.loaded import Loaded, load
from serve.engines.trtllm.orchestration import Orchestration
from serve.engines.trtllm.settings import TrtllmSettings

PROMPT = list(range(1000, 1100))


class Report:
    """Lines, and whether all is well."""

    def __init__(self) -> None:
        self.is_well = True

    def line(self, what: str, found: object, *, ok: bool | None = None) -> None:
        verdict = "" if ok is None else "ok" if ok else "DIFFERS"
        self.is_well = self.is_well and ok is not False
        print(f"{what:<44} {verdict:<8} {found}", flush=True)


async def look(model: Path, tensor: int) -> bool:
    """Start an engine, and look at it."""
    report, kept = Report(), list[Loaded]()

    async def keep(*args: Any) -> Loaded:
        kept.append(await load(*args))
        first_look(kept[0], report)
        return kept[0]

    settings = TrtllmSettings.model_validate({"max_batch_size": 8, "kv_cache": {"max_tokens": 32768}})
    in_process = Orchestration("in_process", environ={"TLLM_WORKER_USE_SINGLE_PROCESS": "1"})
    ranks = in_process if tensor == 1 else Orchestration("mpi")
    engine = TrtllmEngine(model, settings, ParallelLayout(tensor=tensor), ranks, load=keep)
    begin_s = time.monotonic()
    await engine.start()
    report.line("start", f"{time.monotonic() - begin_s:.0f} s: {engine.info}")
    try:
        await requests(engine, kept[0], report)
    finally:
        begin_s = time.monotonic()
        await engine.stop()
        report.line("shutdown", f"{time.monotonic() - begin_s:.1f} s", ok=not engine.is_stuck)
    return report.is_well


def first_look(loaded: Loaded, report: Report) -> None:
    """Look at what only one reader can see, before the engine reads it. Blocks; nothing else runs yet."""
    report.line("SamplingParams has prompt_ignore_length", loaded.support.prompt_ignore)
    report.line("BLAKE3 for cache salts", loaded.library.blake3 is not None)
    report.line("pool blocks told by events", loaded.translator.pool_blocks)


async def requests(engine: TrtllmEngine, loaded: Loaded, report: Report) -> None:
    """Generate in every way, and compare."""
    greedy, cold = await run(engine, "cold", temperature=0.0, max_tokens=32)
    again, warm = await run(engine, "warm", temperature=0.0, max_tokens=32)
    report.line("greedy tokens twice", f"{greedy[:8]} ...", ok=greedy == again)
    report.line("cached tokens, cold and warm", (cold, warm), ok=cold == 0 and warm >= 64)
    await asyncio.sleep(1.0)
    seen = set(loaded.translator._known)
    report.line("v1 block keys", block_keys(PROMPT, 32)[:2], ok=set(block_keys(PROMPT, 32)[:3]) <= seen)
    report.line("KV events", loaded.translator.counts)
    report.line("blocks published", len(engine._ledger.content()), ok=len(engine._ledger.content()) >= 3)
    report.line("statistics of the last step", engine._feed.record() if engine._feed else None)
    stop, _ = await run(engine, "stop", temperature=0.0, max_tokens=32, stop_token_ids=(greedy[3],))
    report.line("a stop token ends the output before it", stop, ok=stop == greedy[: greedy.index(greedy[3])])
    scored = GenerateRequest("s", "m", pack_tokens(PROMPT), SamplingParams(max_tokens=0, prompt_logprobs=1))
    async for delta in engine.generate(scored):
        scores = delta.prefill.prompt_logprobs if delta.prefill else None
        report.line("scores of the prompt", len(scores or ()), ok=scores is not None and len(scores) == len(PROMPT))
    stream = engine.generate(GenerateRequest("a", "m", pack_tokens(PROMPT), SamplingParams(max_tokens=1000)))
    await anext(stream)
    await stream.aclose()
    begin_s = time.monotonic()
    while engine.stats().running and time.monotonic() - begin_s < 20:  # noqa: ASYNC110  # nobody announces it
        await asyncio.sleep(0.01)
    report.line("an aborted request is over", f"{time.monotonic() - begin_s:.2f} s", ok=not engine.stats().running)


async def run(engine: TrtllmEngine, name: str, **sampling: Any) -> tuple[list[int], int]:
    """Return the tokens, and how many of the prompt's were cached."""
    tokens: list[int] = []
    cached = 0
    async for delta in engine.generate(GenerateRequest(name, "m", pack_tokens(PROMPT), SamplingParams(**sampling))):
        tokens.extend(delta.token_ids)
        cached = delta.prefill.cached_tokens if delta.prefill else cached
    return tokens, cached


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description="One look at the TensorRT-LLM that is installed.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--tensor", type=int, default=1)
    given = parser.parse_args()
    is_well = asyncio.run(look(given.model, given.tensor))
    print(json.dumps({"name": "trtllm_smoke", "ok": is_well}))
    sys.exit(0 if is_well else 1)


if __name__ == "__main__":
    main()
