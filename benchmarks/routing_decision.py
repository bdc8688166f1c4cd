"""How long a routing decision takes: hash the prompt, match it against the index, score every replica, rank them."""

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from benchmarks.report import percentile
from serve.core.blocks import block_hashes
from serve.core.kv_events import KvStored
from serve.core.routing.load import LoadReport
from serve.core.routing.policy import Policy
from serve.core.routing.request import RouteRequest
from serve.core.routing.router import Router

TOKENS_PER_BLOCK = 32
_SYSTEM_BLOCKS = 16


@dataclass(frozen=True)
class DecisionTimes:
    """Times of one kind of decision, in s: median and 99th percentile; and the parts of the median."""

    p50_s: float
    p99_s: float
    hash_s: float
    commit_s: float


def busy_router(policy: Policy, replicas: int, prompt_blocks: int, seed: int = 0) -> tuple[Router, list[np.ndarray]]:
    """Return a router whose replicas all have load and hold different parts of some long conversations.

    Returns:
        The router, and the conversations: each (num_tokens,) of uint32.
    """
    rng, draw = random.Random(seed), np.random.default_rng(seed)
    router = Router(policy, TOKENS_PER_BLOCK)
    system = draw.integers(0, 128_000, _SYSTEM_BLOCKS * TOKENS_PER_BLOCK, dtype=np.uint32)
    tokens = prompt_blocks * TOKENS_PER_BLOCK
    prompts = [
        np.concatenate([system, draw.integers(0, 128_000, tokens - len(system), dtype=np.uint32)]) for _ in range(16)
    ]
    chains = [tuple(block_hashes(prompt, TOKENS_PER_BLOCK).tolist()) for prompt in prompts]
    for number in range(replicas):
        name = f"replica-{number}"
        router.add(name, 0.0)
        for chain in rng.sample(chains, 4):
            router.apply(name, [KvStored(chain[: rng.randint(_SYSTEM_BLOCKS, len(chain))], 0)])
        running = rng.randint(0, 60)
        report = LoadReport(
            running=running,
            waiting=rng.randint(0, 4),
            queued_prefill_tokens=rng.randint(0, 40_000),
            used_blocks=running * 100,
            total_blocks=14_000,
            committed_blocks=running * 120,
            context_tokens=running * 3000,
        )
        router.report(name, report, 0.0)
    return router, prompts


def time_decisions(policy: Policy, replicas: int, prompt_tokens: int, rounds: int) -> DecisionTimes:
    """Measure decisions for prompts of a length, each followed by its reservation, as a gateway makes them."""
    router, prompts = busy_router(policy, replicas, prompt_tokens // TOKENS_PER_BLOCK)
    whole: list[float] = []
    hashing: list[float] = []
    committing: list[float] = []
    gc.collect()
    for number in range(rounds):
        prompt, now_s = prompts[number % len(prompts)], number * 1e-3
        began = time.perf_counter()
        hashes = block_hashes(prompt, TOKENS_PER_BLOCK)
        hashed = time.perf_counter()
        request = RouteRequest(number, hashes, len(prompt), 256)
        decision = router.route(request, now_s)
        decided = time.perf_counter()
        assert decision is not None
        router.commit(request, decision, now_s)
        committing.append(time.perf_counter() - decided)
        whole.append(decided - began)
        hashing.append(hashed - began)
        router.settle(number)
    return DecisionTimes(
        percentile(whole, 0.5), percentile(whole, 0.99), percentile(hashing, 0.5), percentile(committing, 0.5)
    )


def time_policies(make: Mapping[str, Callable[[], Policy]], replicas: int, prompt_tokens: int) -> dict[str, float]:
    """Return the median time of a whole decision, in s, for each policy."""
    return {name: time_decisions(one(), replicas, prompt_tokens, 300).p50_s for name, one in make.items()}
