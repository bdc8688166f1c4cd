"""The transformers engine alone, beside the library's own loop: latency, throughput, prefix reuse, idle time.

    python -m benchmarks.transformers_engine [--model DIRECTORY] [--threads N]

Prompts are random tokens; nothing is compared across machines, but for the ratios.
"""

import argparse
import asyncio
import itertools
import time
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
import transformers

from benchmarks.report import Report
from serve.core.request import GenerateRequest, PrefillInfo, SamplingParams, pack_tokens
from serve.engines.transformers.engine import TransformersEngine
from serve.engines.transformers.settings import TransformersSettings

QUICKSTART = Path(__file__).parent.parent / "serve" / "models" / "quickstart"
OUTPUT_TOKENS = 64
PREFIX_TOKENS = 2_000


@dataclass(frozen=True)
class Timing:
    """One stream as its reader saw it."""

    ttft_s: float
    tpot_s: float
    prefill: PrefillInfo


class Client:
    """Asks an engine for random prompts, never the same twice."""

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine = engine
        self._ids = itertools.count()

    def prompt(self, tokens: int) -> list[int]:
        rng = np.random.default_rng(next(self._ids))
        prompt: list[int] = rng.integers(5, self._engine.info.vocab_size, tokens).tolist()
        return prompt

    async def run(self, prompt: list[int], max_tokens: int, sampling: SamplingParams | None = None) -> Timing:
        sampling = sampling or SamplingParams(temperature=0.0, max_tokens=max_tokens)
        request = GenerateRequest(str(next(self._ids)), "benchmark", pack_tokens(prompt), sampling)
        started_s, times, prefill = time.monotonic(), [], None
        async with aclosing(self._engine.generate(request)) as deltas:
            async for delta in deltas:
                times.append(time.monotonic())
                prefill = prefill or delta.prefill
        assert prefill is not None
        return Timing(times[0] - started_s, (times[-1] - times[0]) / max(1, len(times) - 1), prefill)


async def measure(report: Report, model_dir: Path, threads: int) -> None:
    """Measure the engine and add its figures."""
    engine = TransformersEngine(model_dir, TransformersSettings(num_threads=threads))
    started_s = time.monotonic()
    await engine.start()
    report.add("start, warm-up included", time.monotonic() - started_s, "s")
    client = Client(engine)
    await single(report, client)
    for streams in (8, 32):
        await together(report, client, streams)
    await prefix(report, client)
    cpu_s = time.process_time()
    await asyncio.sleep(1.0)
    report.add("CPU of an idle engine", 100 * (time.process_time() - cpu_s), "% of a core", "<= 1")
    await engine.stop()


async def single(report: Report, client: Client) -> None:
    """One stream, greedy and with every sampling parameter in use."""
    timings = [await client.run(client.prompt(64), OUTPUT_TOKENS) for _ in range(4)]
    report.add("1 stream, prompt of 64: TTFT", 1e3 * median(t.ttft_s for t in timings), "ms")
    report.add("1 stream, prompt of 64: TPOT", 1e3 * median(t.tpot_s for t in timings), "ms")
    everything = SamplingParams(
        temperature=0.8,
        top_p=0.95,
        top_k=50,
        min_p=0.01,
        seed=1,
        repetition_penalty=1.1,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        logit_bias={7: 1.0},
        logprobs=5,
        max_tokens=OUTPUT_TOKENS,
    )
    timings = [await client.run(client.prompt(64), OUTPUT_TOKENS, everything) for _ in range(4)]
    report.add("1 stream, every sampling parameter: TPOT", 1e3 * median(t.tpot_s for t in timings), "ms")


async def together(report: Report, client: Client, streams: int) -> None:
    """Streams that arrive together."""
    for prompt_tokens in (64, 512):
        prompts = [client.prompt(prompt_tokens) for _ in range(streams)]
        started_s = time.monotonic()
        timings = await asyncio.gather(*(client.run(prompt, OUTPUT_TOKENS) for prompt in prompts))
        name = f"{streams} streams, prompt of {prompt_tokens}"
        report.add(f"{name}: throughput", streams * OUTPUT_TOKENS / (time.monotonic() - started_s), "tokens/s")
        report.add(f"{name}: TTFT p50", 1e3 * median(t.ttft_s for t in timings), "ms")


async def prefix(report: Report, client: Client) -> None:
    """The second request with the same long prefix."""
    ratios, cold_s, warm_s = [], [], []
    for _ in range(3):
        common = client.prompt(PREFIX_TOKENS)
        cold, warm = [await client.run(common + client.prompt(20), 4) for _ in range(2)]
        assert cold.prefill.cached_tokens == 0
        assert warm.prefill.cached_tokens > PREFIX_TOKENS - 64
        cold_s.append(cold.ttft_s)
        warm_s.append(warm.ttft_s)
        ratios.append(cold.ttft_s / warm.ttft_s)
    report.add(f"TTFT, prefix of {PREFIX_TOKENS} tokens: first time", 1e3 * median(cold_s), "ms")
    report.add(f"TTFT, prefix of {PREFIX_TOKENS} tokens: again", 1e3 * median(warm_s), "ms")
    report.add(f"TTFT, prefix of {PREFIX_TOKENS} tokens: ratio", median(ratios), "x", ">= 5")


def library_throughput(model_dir: Path, threads: int, streams: int, prompt_tokens: int) -> float:
    """Return the tokens a second of the library's own loop, which samples all sequences greedily."""
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    config = transformers.ContinuousBatchingConfig(
        num_blocks=128, max_batch_tokens=512, max_requests_per_batch=64, safety_margin=0.0
    )
    rng = np.random.default_rng(0)
    prompts = rng.integers(5, model.config.vocab_size, (streams, prompt_tokens)).tolist()
    generation = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=OUTPUT_TOKENS)
    seconds = []
    for _ in range(2):  # the first warms up
        started_s = time.monotonic()
        outputs = model.generate_batch(prompts, generation_config=generation, continuous_batching_config=config)
        seconds.append(time.monotonic() - started_s)
        assert sum(len(output.generated_tokens) for output in outputs.values()) == streams * OUTPUT_TOKENS
    return streams * OUTPUT_TOKENS / seconds[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=QUICKSTART)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    report = Report("transformers_engine", "python -m benchmarks.transformers_engine")
    asyncio.run(measure(report, arguments.model, arguments.threads))
    throughput = {figure.name: figure.value for figure in report.figures}
    for prompt_tokens in (64, 512):
        own = throughput[f"32 streams, prompt of {prompt_tokens}: throughput"]
        theirs = library_throughput(arguments.model, arguments.threads, 32, prompt_tokens)
        report.add(f"the library's own loop, 32 streams, prompt of {prompt_tokens}", theirs, "tokens/s")
        report.add(f"engine over the library's own loop, prompt of {prompt_tokens}", own / theirs, "x", ">= 1")
    report.note(f"transformers {transformers.__version__}, torch {torch.__version__}, {arguments.threads} thread(s).")
    report.finish()


if __name__ == "__main__":
    main()
