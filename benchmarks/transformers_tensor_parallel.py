"""Tensor parallelism of the transformers engine: equal to one rank's output, and how fast. Needs no checkpoint, no Ray.

    python -m benchmarks.transformers_tensor_parallel [--degrees 1,2,4] [--device cpu --tiny]

A Llama of random weights (the shape of Llama 3.1 8B, or a tiny one) is made from a seed and saved. For every degree an
engine is started with a process for each rank. On a GPU, where the ranks talk over NCCL and compute in bfloat16:

- Logits of fixed prompts, at every position, are compared with those of a float32 forward pass of the same weights.
  The tolerance is the error that bfloat16 itself makes: a degree's largest and mean differences from degree 1 may be
  at most twice what degree 1's are from float32, since both round independently, and adding partial sums in another
  order is one more rounding among many. On a CPU all is in float32; differences are held to 1e-3 of the largest logit.
- Greedy tokens are compared with those of degree 1; in bfloat16 near ties fall either way, and what follows with them.
- Throughput of 1, 16 and 64 streams, and the time to the first token of a prompt of 2,048 tokens.

Each figure is one JSON line, then a table; the exit status is 1 if anything is wrong.
"""

import argparse
import asyncio
import gc
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

from serve.core.request import GenerateRequest, SamplingParams, pack_tokens
from serve.engines.transformers.engine import TransformersEngine
from serve.engines.transformers.settings import TransformersSettings
from serve.engines.transformers.tensor_parallel import TensorRank, open_store, run_follower

LARGE: dict[str, Any] = {  # the shape of Llama 3.1 8B
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
}
TINY: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}
CHECKED_PROMPTS = (33, 257, 700)  # tokens
GREEDY_TOKENS = 64
CPU_TOLERANCE = 1e-3  # of the largest logit
MEETING_S = 300.0


@dataclass
class Findings:
    """All figures, as they come.

    Attributes:
        table: Figure -> degree -> value.
        failed: Whether one does not hold.
    """

    table: dict[str, dict[int, str]] = field(default_factory=dict)
    failed: bool = False

    def note(self, degree: int, name: str, value: float, unit: str, at_most: float | None = None) -> None:
        """Print one figure, and remember whether it holds."""
        ok = None if at_most is None else value <= at_most
        self.failed |= ok is False
        line = {"degree": degree, "name": name, "value": float(f"{value:.5g}"), "unit": unit}
        if at_most is not None:
            line |= {"at_most": float(f"{at_most:.5g}"), "ok": ok}
        print(json.dumps(line), flush=True)
        mark = {None: "", True: " ok", False: " NO"}[ok]
        self.table.setdefault(f"{name}, {unit}", {})[degree] = f"{value:.4g}{mark}"

    def print_table(self, degrees: list[int]) -> None:
        """Print figures by degree."""
        width = max(len(name) for name in self.table)
        print(f"\n{'':{width}}" + "".join(f"  {f'tensor={d}':>14}" for d in degrees))
        for name, values in self.table.items():
            print(f"{name:{width}}" + "".join(f"  {values.get(d, ''):>14}" for d in degrees))


@dataclass(frozen=True)
class Measured:
    """What one degree computed of the fixed prompts.

    Attributes:
        logits: For each prompt (tokens - 1, vocab_size), float32, on the CPU.
        tokens: Greedy continuation of each.
    """

    logits: list[torch.Tensor]
    tokens: list[list[int]]


def make_model(directory: Path, shape: dict[str, Any], device: str) -> None:
    """Save a Llama of random weights, the same wherever it is made on the same kind of device."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        config = LlamaConfig(**shape, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                # So that activations keep their size through the layers, and logits differ by more than rounding.
                gain = 2.0 if name.startswith("lm_head") else 1.0
                torch.nn.init.normal_(parameter, std=gain * parameter.shape[1] ** -0.5)
    model.save_pretrained(directory)
    del model
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def prompt_of(seed: int, tokens: int, vocab_size: int) -> list[int]:
    """Return a prompt that depends on the seed only."""
    return random.Random(seed).choices(range(vocab_size), k=tokens)


def checked_prompts(vocab_size: int) -> list[list[int]]:
    """Return the prompts whose logits are compared."""
    return [prompt_of(i, tokens, vocab_size) for i, tokens in enumerate(CHECKED_PROMPTS)]


def reference_logits(directory: Path, device: str, vocab_size: int) -> list[torch.Tensor]:
    """Return the logits of a plain forward pass in float32."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").to(device).float()
    with torch.inference_mode():
        logits = [
            model(torch.tensor([prompt[:-1]], device=device)).logits[0].float().cpu()
            for prompt in checked_prompts(vocab_size)
        ]
    del model
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return logits


@contextmanager
def followers(arguments: argparse.Namespace, directory: Path, degree: int, port: int) -> Iterator[None]:
    """Have a process for each rank but 0."""
    own = [sys.executable, "-m", "benchmarks.transformers_tensor_parallel", "--device", arguments.device]
    started = [
        subprocess.Popen([*own, "--follow", str(directory), str(rank), str(degree), str(port)])
        for rank in range(1, degree)
    ]
    try:
        yield
        for process in started:
            if process.wait(60):
                raise RuntimeError(f"a follower ended with status {process.returncode}")
    finally:
        for process in started:
            process.kill()


def settings_of(device: str) -> TransformersSettings:
    """Return the settings that all ranks have."""
    if device == "cuda":
        return TransformersSettings(device="cuda", dtype="bfloat16", kv_cache_tokens=262_144)
    return TransformersSettings(device="cpu", dtype="float32", kv_cache_tokens=32_768, num_threads=1)


@asynccontextmanager
async def started(arguments: argparse.Namespace, directory: Path, degree: int) -> AsyncIterator[TransformersEngine]:
    """Run an engine of so many ranks."""
    settings = settings_of(arguments.device)
    if degree == 1:
        engine = TransformersEngine(directory, settings)
        await engine.start()
        try:
            yield engine
        finally:
            await engine.stop()
        return
    store, port = open_store("127.0.0.1")
    with followers(arguments, directory, degree, port):
        engine = TransformersEngine(directory, settings, rank_of(0, degree, port, arguments.device))
        await engine.start()
        try:
            yield engine
        finally:
            await engine.stop()
    del store


def rank_of(rank: int, degree: int, port: int, device: str) -> TensorRank:
    """Return a rank, on the GPU of its number."""
    return TensorRank(rank, degree, "127.0.0.1", port, rank if device == "cuda" else None, MEETING_S)


async def run(
    engine: TransformersEngine, name: str, prompt: list[int], **sampling: Any
) -> tuple[list[int], list[float]]:
    """Generate greedily; the tokens, and when the request and then each delta came."""
    params = SamplingParams(temperature=0.0, **sampling)
    tokens: list[int] = []
    times = [time.monotonic()]
    async with aclosing(engine.generate(GenerateRequest(name, "check", pack_tokens(prompt), params))) as deltas:
        async for delta in deltas:
            tokens += delta.token_ids
            times.append(time.monotonic())
    return tokens, times


async def measure_outputs(engine: TransformersEngine, prompts: list[list[int]]) -> Measured:
    """Take the logits of the prompts out of the leader's forward passes, and generate."""
    assert engine._thread is not None
    assert engine._thread.steps is not None
    model = engine._thread.steps._batcher._model  # a benchmark may look where no caller can
    logits: list[torch.Tensor] = []
    taken: list[torch.Tensor] = []
    hook = model.register_forward_hook(lambda _module, _inputs, output: taken.append(output.logits[0].float().cpu()))
    for i, prompt in enumerate(prompts):
        taken.clear()
        await run(engine, f"scored {i}", prompt, max_tokens=0, prompt_logprobs=0)
        logits.append(torch.cat(taken))
    hook.remove()
    tokens = [(await run(engine, f"greedy {i}", p, max_tokens=GREEDY_TOKENS))[0] for i, p in enumerate(prompts)]
    return Measured(logits, tokens)


def compare_outputs(
    findings: Findings, degree: int, own: Measured, one: Measured, reference: list[torch.Tensor], device: str
) -> None:
    """Hold a degree's logits to those of degree 1, and note how far both are from float32."""
    worst, mean = difference(own.logits, reference)
    findings.note(degree, "logits, largest difference from float32", worst, "")
    findings.note(degree, "logits, mean difference from float32", mean, "")
    if degree == 1:
        return
    if device == "cuda":
        bounds = tuple(2 * d for d in difference(one.logits, reference))
    else:
        largest = max(float(logits.abs().max()) for logits in reference)
        bounds = (CPU_TOLERANCE * largest, CPU_TOLERANCE * largest)
    worst, mean = difference(own.logits, one.logits)
    findings.note(degree, "logits, largest difference from tensor=1", worst, "", bounds[0])
    findings.note(degree, "logits, mean difference from tensor=1", mean, "", bounds[1])
    cosines = [
        torch.nn.functional.cosine_similarity(a, b, dim=-1).min() for a, b in zip(own.logits, one.logits, strict=True)
    ]
    findings.note(degree, "logits, 1 - least cosine with tensor=1", 1 - float(min(cosines)), "", 0.01)
    likeliest = [(a.argmax(-1) == b.argmax(-1)).float() for a, b in zip(own.logits, one.logits, strict=True)]
    findings.note(degree, "likeliest token equal to tensor=1", float(torch.cat(likeliest).mean()), "share")
    equal = sum(a == b for x, y in zip(own.tokens, one.tokens, strict=True) for a, b in zip(x, y, strict=True))
    findings.note(degree, "greedy tokens equal to tensor=1", equal / sum(map(len, one.tokens)), "share")


def difference(left: list[torch.Tensor], right: list[torch.Tensor]) -> tuple[float, float]:
    """Return the largest and the mean absolute difference."""
    gaps = [(a - b).abs() for a, b in zip(left, right, strict=True)]
    total = sum(gap.numel() for gap in gaps)
    return max(float(gap.max()) for gap in gaps), sum(float(gap.double().sum()) for gap in gaps) / total


async def time_streams(
    findings: Findings, engine: TransformersEngine, degree: int, arguments: argparse.Namespace
) -> None:
    """Latency and throughput."""
    vocab_size = engine.info.vocab_size
    firsts = []
    for i in range(6):
        _, times = await run(engine, f"long {i}", prompt_of(9000 + i, 2048, vocab_size), max_tokens=2)
        firsts.append(times[1] - times[0])
    findings.note(degree, "TTFT p50, prompt of 2,048", 1e3 * median(firsts[1:]), "ms")
    for streams in (1, 16, 64):
        prompts = [prompt_of(1000 * streams + i, 128, vocab_size) for i in range(streams)]
        began_s = time.monotonic()
        results = await asyncio.gather(
            *(run(engine, f"{streams} {i}", p, max_tokens=arguments.tokens) for i, p in enumerate(prompts))
        )
        elapsed_s = time.monotonic() - began_s
        findings.note(degree, f"{streams} streams, throughput", streams * arguments.tokens / elapsed_s, "tokens/s")
        tpots = [(t[-1] - t[1]) / (len(t) - 2) for _, t in results]
        findings.note(degree, f"{streams} streams, TPOT p50", 1e3 * median(tpots), "ms")


async def check(arguments: argparse.Namespace, findings: Findings, directory: Path) -> None:
    shape = TINY if arguments.tiny else LARGE
    prompts = checked_prompts(shape["vocab_size"])
    reference = reference_logits(directory, arguments.device, shape["vocab_size"])
    one: Measured | None = None
    for degree in arguments.degrees:
        began_s = time.monotonic()
        async with started(arguments, directory, degree) as engine:
            findings.note(degree, "start", time.monotonic() - began_s, "s")
            findings.note(degree, "KV cache", engine.info.total_blocks * engine.info.tokens_per_block, "tokens")
            if arguments.device == "cuda":
                findings.note(degree, "GPU memory of rank 0", torch.cuda.memory_allocated() / 2**30, "GiB")
            measured = await measure_outputs(engine, prompts)
            one = one or measured
            compare_outputs(findings, degree, measured, one, reference, arguments.device)
            await time_streams(findings, engine, degree, arguments)
            findings.note(degree, "blocks held at the end", engine.stats().used_blocks, "blocks", 0)
        gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--degrees", default="1,2", type=lambda text: [int(d) for d in text.split(",")])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a model that a CPU can compute")
    parser.add_argument("--tokens", type=int, default=128, help="output tokens of each stream")
    parser.add_argument("--dir", type=Path, default=None, help="where the model is saved while this runs")
    parser.add_argument("--follow", nargs=4, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = False
    if arguments.follow:
        directory, rank, degree, port = arguments.follow
        tensor_rank = rank_of(int(rank), int(degree), int(port), arguments.device)
        run_follower(Path(directory), settings_of(arguments.device), tensor_rank, lambda: None)
        return
    if arguments.degrees[0] != 1:
        parser.error("--degrees has to begin with 1, which the others are compared with")
    sys.exit(run_all(arguments))


def run_all(arguments: argparse.Namespace) -> int:
    """Make the model, check every degree, and print what was found."""
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    print(f"{where}, torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    findings = Findings()
    directory = Path(tempfile.mkdtemp(dir=arguments.dir))
    try:
        began_s = time.monotonic()
        make_model(directory, TINY if arguments.tiny else LARGE, arguments.device)
        print(f"made the model in {time.monotonic() - began_s:.0f} s", flush=True)
        asyncio.run(check(arguments, findings, directory))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    findings.print_table(arguments.degrees)
    return int(findings.failed)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
