"""The transformers engine on a GPU: right in float32, and how fast in bfloat16. Needs no checkpoint and no Ray.

    python -m benchmarks.transformers_cuda_check [--quick] [--device cpu]

Models have random weights. With each kind of attention that the machine has, greedy tokens are compared with those of
`generate`; then a model of about a billion parameters is timed. Each figure is one JSON line; the exit status is 1 if
anything is wrong. Where there is a GPU, `pytest tests/contract/test_transformers_engine.py` runs on it, too.
"""

import argparse
import asyncio
import gc
import json
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from serve.core.request import GenerateRequest, PrefillInfo, SamplingParams, pack_tokens
from serve.engines.transformers.engine import TransformersEngine
from serve.engines.transformers.settings import TransformersSettings

SMALL: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
LARGE: dict[str, Any] = {  # the shape of Llama 3.2 1B
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 16_384,
}
_failed = False


def figure(name: str, value: float, unit: str, hold: str = "") -> None:
    """Print one figure, and remember whether it holds."""
    global _failed
    ok = None
    if hold:
        relation, bound = hold.split()
        ok = value <= float(bound) if relation == "<=" else value >= float(bound)
        _failed = _failed or not ok
    print(json.dumps({"name": name, "value": float(f"{value:.5g}"), "unit": unit, "hold": hold, "ok": ok}), flush=True)


def make_model(directory: Path, shape: dict[str, Any], dtype: torch.dtype, std: float) -> None:
    """Save a Llama with random weights; a larger `std` sets logits further apart."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, tie_word_embeddings=False), dtype=dtype)
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(directory)


@asynccontextmanager
async def started(directory: Path, **settings: Any) -> AsyncIterator[TransformersEngine]:
    engine = TransformersEngine(directory, TransformersSettings(**settings))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def prompt_of(seed: int, tokens: int, vocab_size: int) -> list[int]:
    return random.Random(seed).choices(range(vocab_size), k=tokens)


async def run(
    engine: TransformersEngine, name: str, prompt: list[int], **sampling: Any
) -> tuple[list[int], list[float], PrefillInfo]:
    """Generate; the tokens, when each delta came, and what the first one said."""
    params = SamplingParams(**{"temperature": 0.0, **sampling})
    tokens: list[int] = []
    times = [time.monotonic()]
    prefill = PrefillInfo()
    async with aclosing(engine.generate(GenerateRequest(name, "check", pack_tokens(prompt), params))) as deltas:
        async for delta in deltas:
            tokens += delta.token_ids
            times.append(time.monotonic())
            prefill = delta.prefill or prefill
    return tokens, times, prefill


async def check_tokens(directory: Path, device: str, attention: str, dtype: str) -> None:
    """Compare greedy tokens with those of `generate`, cold and from the prefix cache."""
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).to(device)
    prompts = [prompt_of(seed, 5 + 97 * seed, SMALL["vocab_size"]) for seed in range(12)]
    equal = total = 0
    # 256, since flash-attn reads a block table in such pages only
    async with started(directory, device=device, dtype=dtype, attention=attention, tokens_per_block=256) as engine:
        for attempt in ("cold", "warm"):
            results = await asyncio.gather(
                *(run(engine, f"{attempt} {i}", prompt, max_tokens=40) for i, prompt in enumerate(prompts))
            )
            for prompt, (tokens, _, _) in zip(prompts, results, strict=True):
                ids = torch.tensor([prompt], device=device)
                mask = torch.ones_like(ids)
                with torch.no_grad():
                    output = plain.generate(
                        ids, attention_mask=mask, max_new_tokens=40, do_sample=False, eos_token_id=None
                    )
                equal += sum(a == b for a, b in zip(tokens, output[0, len(prompt) :].tolist(), strict=True))
                total += 40
        await check_sampling(engine, f"{attention}, {dtype}", prompts[3])
        figure(f"{attention}, {dtype}: blocks held at the end", engine.stats().used_blocks, "blocks", "<= 0")
    # In 16 bits a near tie may fall the other way, and all that follows with it.
    hold = ">= 1" if dtype == "float32" else ""
    figure(f"{attention}, {dtype}: tokens equal to generate's", equal / total, "share", hold)


async def check_sampling(engine: TransformersEngine, name: str, prompt: list[int]) -> None:
    """A seeded stream is the same alone and among others that use everything."""
    drawn: dict[str, Any] = {"temperature": 1.2, "top_p": 0.9, "seed": 5, "max_tokens": 30, "logprobs": 3}
    alone, _, _ = await run(engine, "alone", prompt, **drawn)
    others: dict[str, Any] = {"top_k": 20, "min_p": 0.1, "repetition_penalty": 1.2, "frequency_penalty": 0.3}
    crowd = await asyncio.gather(
        run(engine, "same", prompt, **drawn),
        *(run(engine, f"other {i}", prompt[i:], temperature=1.0, max_tokens=30, **others) for i in range(1, 6)),
        run(engine, "scored", prompt, max_tokens=3, prompt_logprobs=5),
    )
    same = sum(a == b for a, b in zip(crowd[0][0], alone, strict=True)) / len(alone)
    figure(f"{name}: seeded tokens equal in a crowd", same, "share", ">= 1" if "float32" in name else "")
    entries = crowd[-1][2].prompt_logprobs or ()
    figure(f"{name}: scored prompt tokens", len(entries) / len(prompt), "share", ">= 1")


async def time_streams(directory: Path, device: str, attention: str) -> None:
    """Latency and throughput of the large model, and its prefix cache."""
    began_s = time.monotonic()
    async with started(directory, device=device, attention=attention, max_batch_size=128) as engine:
        figure(f"{attention}: start", time.monotonic() - began_s, "s")
        figure(f"{attention}: KV cache", engine.info.total_blocks * engine.info.tokens_per_block, "tokens")
        vocab_size = engine.info.vocab_size
        for streams in (1, 32, 128):
            prompts = [prompt_of(1000 * streams + i, 512, vocab_size) for i in range(streams)]
            began_s = time.monotonic()
            results = await asyncio.gather(
                *(run(engine, f"{streams} {i}", prompt, max_tokens=128) for i, prompt in enumerate(prompts))
            )
            elapsed_s = time.monotonic() - began_s
            figure(f"{attention}: {streams} streams", streams * 128 / elapsed_s, "tokens/s")
            figure(f"{attention}: {streams} streams, TTFT p50", 1e3 * median(t[1] - t[0] for _, t, _ in results), "ms")
            tpots = [(t[-1] - t[1]) / (len(t) - 2) for _, t, _ in results]
            figure(f"{attention}: {streams} streams, TPOT p50", 1e3 * median(tpots), "ms")
        common = prompt_of(7, 8000, vocab_size)
        (_, cold, _), (_, warm, again) = [await run(engine, f"p{i}", [*common, i], max_tokens=4) for i in range(2)]
        figure(f"{attention}: cached tokens of 8,000", again.cached_tokens, "tokens", ">= 7900")
        figure(f"{attention}: TTFT ratio, cached prefix", (cold[1] - cold[0]) / (warm[1] - warm[0]), "x", ">= 2")
        streams_ = [engine.generate(GenerateRequest(f"c{i}", "m", pack_tokens([*common, i]))) for i in range(64)]
        for stream in streams_:
            await anext(stream)
            await stream.aclose()
        await asyncio.sleep(0.5)
        figure(f"{attention}: blocks held after 64 cancellations", engine.stats().used_blocks, "blocks", "<= 0")
    gc.collect()
    if device == "cuda":
        figure(f"{attention}: GPU memory held after stop", torch.cuda.memory_allocated() / 2**20, "MiB", "<= 64")


async def check(arguments: argparse.Namespace) -> None:
    kinds = ["paged", "sdpa"]
    if arguments.device == "cuda":
        kinds += ["flash_attention_2"] if is_flash_attn_2_available() else []
        kinds += ["flash_attention_3"] if is_flash_attn_3_available() else []
    with tempfile.TemporaryDirectory() as small, tempfile.TemporaryDirectory() as large:
        make_model(Path(small), SMALL, torch.float32, std=0.1)
        for kind in kinds:
            for dtype in ("float32", "bfloat16"):
                if not (kind.startswith("flash") and dtype == "float32"):
                    await check_tokens(Path(small), arguments.device, kind, dtype)
        if not arguments.quick:
            make_model(Path(large), LARGE, torch.bfloat16, std=0.02)
            for kind in kinds:
                if kind != "sdpa":  # its mask of the whole cache is what `paged` is there to avoid
                    await time_streams(Path(large), arguments.device, kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only check tokens")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = False
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    print(f"{where}, torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    asyncio.run(check(arguments))
    sys.exit(_failed)


if __name__ == "__main__":
    main()
