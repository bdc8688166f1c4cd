"""Live: prefix-aware routing beside Ray Serve's own routers, in one run: `make bench-routing-live`.

    python -m benchmarks.routing_live

Four replicas of the transformers engine with the quickstart model on this machine's CPU. Clients ask questions about a
few long documents, one after the other, several at a time: what counts is whether a question reaches a replica that has
the document's KV blocks. Ray Serve's default router, the power of two choices, knows nothing of them. Its
PrefixCacheAffinityRouter cannot be imported without vLLM or SGLang (`import ray.serve.llm` fails), so its rule takes
part as the policy `ray_llm_prefix`, over our index.
"""

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.load import Connection
from benchmarks.report import Report, percentile
from tests.integration.serving import Serving

REPLICAS = 4
DOCUMENTS = 12
DOCUMENT_TOKENS = 1500
QUESTIONS = 80
CLIENTS = 4
POLICIES = ("serve", "ray_llm_prefix", "least_requests", "predictive")
TITLES = {"serve": "Ray Serve's power of two", "ray_llm_prefix": "Ray Serve LLM's prefix rule"}


@dataclass(frozen=True)
class Answers:
    """What the clients saw: times to first token in s, and the share of prompt tokens that were cached."""

    ttft_s: list[float]
    hit_rate: float
    wall_s: float


def prompts(seed: int = 3) -> list[list[int]]:
    """Return questions, each a document and some tokens of its own; popular documents come more often."""
    rng = random.Random(seed)
    documents = [[rng.randrange(300, 3000) for _ in range(DOCUMENT_TOKENS)] for _ in range(DOCUMENTS)]
    weights = [1 / (rank + 2) for rank in range(DOCUMENTS)]
    return [
        documents[rng.choices(range(DOCUMENTS), weights)[0]] + [rng.randrange(300, 3000) for _ in range(40)]
        for _ in range(QUESTIONS)
    ]


def main() -> None:
    """Ask the same questions under each router, and write the report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--policies", default=",".join(POLICIES), help="`serve` and `predictive` among them")
    policies = parser.parse_args().policies
    report = Report("routing_live", f"python -m benchmarks.routing_live --policies {policies}")
    asked, found = prompts(), {}
    for policy in policies.split(","):
        with tempfile.TemporaryDirectory() as directory:
            found[policy] = answers = _live(asked, Path(directory), policy)
        title = TITLES.get(policy, policy)
        report.add(f"{title}: hit rate", 100 * answers.hit_rate, "%")
        report.add(f"{title}: TTFT p50", 1e3 * statistics.median(answers.ttft_s), "ms")
        report.add(f"{title}: TTFT p90", 1e3 * percentile(answers.ttft_s, 0.9), "ms")
        report.add(f"{title}: all questions", answers.wall_s, "s")
    ours, plain = found["predictive"], found["serve"]
    gain = statistics.median(plain.ttft_s) / statistics.median(ours.ttft_s)
    report.add("predictive over Ray Serve's power of two: hit rate", ours.hit_rate / plain.hit_rate, "x", ">= 1")
    report.add("predictive over Ray Serve's power of two: TTFT p50, times shorter", gain, "x", ">= 1")
    report.note(
        f"{QUESTIONS} questions about {DOCUMENTS} documents of {DOCUMENT_TOKENS} tokens, {CLIENTS} clients, "
        f"{REPLICAS} replicas of the transformers engine on the CPU."
    )
    report.finish()


def _live(asked: Sequence[list[int]], directory: Path, policy: str) -> Answers:
    print(f"{policy}:", file=sys.stderr)
    model = {
        "id": "m",
        "engine": {"kind": "transformers", "num_threads": 1},
        "replicas": REPLICAS,
        "routing": {"policy": policy},
        "resources": {"num_cpus": 0.05},
    }
    serving = Serving({"models": [model], "gateway": {"num_cpus": 0.05}}, directory)
    try:
        serving.wait_until_ready()
        answers: Answers = uvloop.run(_ask(serving.port, asked))
        return answers
    finally:
        serving.end()


async def _ask(port: int, asked: Sequence[list[int]]) -> Answers:
    waiting = list(reversed(asked))
    ttft_s: list[float] = []
    cached = 0

    async def client() -> None:
        nonlocal cached
        connection = await Connection.open(port)
        while waiting:
            connection = await connection.renewed(port)
            body: dict[str, Any] = {
                "model": "m",
                "prompt": waiting.pop(),
                "max_tokens": 8,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            record = await connection.request("/v1/completions", body)
            if record.status != 200 or not record.complete:
                raise RuntimeError(f"status {record.status}: {record.body[:300]!r}")
            ttft_s.append(record.ttft_s)
            cached += record.cached_tokens
        connection.close()

    began_s = time.monotonic()
    await asyncio.gather(*[client() for _ in range(CLIENTS)])
    total = sum(len(prompt) for prompt in asked)
    return Answers(ttft_s, cached / total, time.monotonic() - began_s)


if __name__ == "__main__":
    main()
