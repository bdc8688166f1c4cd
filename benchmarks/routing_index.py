"""What the parts of a routing decision that depend on prompts cost: block hashes, and the prefix index.

python -m benchmarks.routing_index      # about two minutes
"""

import gc
import random
import resource
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from statistics import median

import numpy as np

from benchmarks.report import Figure, Report
from serve.core.blocks import ROOT, Hashes, block_hashes
from serve.core.kv_events import KvEvent, KvRemoved, KvStored
from serve.core.prefix_index import PrefixIndex

TOKENS_PER_BLOCK = 32
CAPS = (1.0, 0.5, 0.25, 0.1)
Chain = tuple[int, ...]


def measure() -> list[Figure]:
    """Return all figures."""
    figures = [
        Figure("block_hashes, 8k tokens, p50", hash_s(8192) * 1e6, "us", "<= 35"),
        Figure("block_hashes, 128k tokens, p50", hash_s(131_072) * 1e6, "us", "<= 450"),
        *_match_figures(),
        *_apply_figures(),
    ]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for replicas in (64, 1000):
            used = pool.submit(bytes_per_block, replicas).result()
            figures.append(Figure(f"memory of an indexed block, {replicas} replicas", used, "bytes", "<= 200"))
    figures.append(Figure("longest event while a replica is forgotten, p99.9", forgetting_s() * 1e3, "ms"))
    for gateways in (1, 4):
        for cap, share in recall(gateways).items():
            name = f"hit blocks found, cap {cap:.0%} of the need, {_seen_by(gateways)}"
            figures.append(Figure(name, share, "share", ">= 1" if cap == 1.0 else ""))
    return figures


def median_s(call: Callable[[int], object], rounds: int) -> float:
    """Return the median time of a call, which gets its number, in s."""
    for number in range(rounds // 10):
        call(number)
    times = []
    gc.collect()
    for number in range(rounds):
        began = time.perf_counter()
        call(number)
        times.append(time.perf_counter() - began)
    return median(times)


def hash_s(tokens: int) -> float:
    """Return how long it takes to hash a prompt, in s."""
    prompts = np.random.default_rng(0).integers(0, 128_000, (16, tokens), dtype=np.uint32)
    return median_s(lambda number: block_hashes(prompts[number % 16], TOKENS_PER_BLOCK), 800)


def random_chain(rng: np.random.Generator, blocks: int, parent: int = ROOT) -> Chain:
    """Return hashes of random blocks after `parent`."""
    return tuple(block_hashes(rng.integers(0, 128_000, 2 * blocks, dtype=np.uint32), 2, parent).tolist())


def _match_figures() -> Iterator[Figure]:
    for replicas, blocks, hold in ((64, 256, "<= 25"), (1000, 4096, "<= 700")):
        index, prompts = shared_conversations(replicas, blocks)
        name = f"match, {blocks} blocks x {replicas} replicas"
        as_arrays = [np.array(prompt, dtype=np.uint64) for prompt in prompts]
        yield Figure(f"{name}, p50", match_s(index, as_arrays) * 1e6, "us", hold)
        yield Figure(f"{name}, hashes in a list, p50", match_s(index, prompts) * 1e6, "us")


def match_s(index: PrefixIndex, prompts: Sequence[Chain] | Sequence[Hashes]) -> float:
    """Return how long an answer takes, in s."""
    return median_s(lambda number: index.match(prompts[number % len(prompts)]), 400_000 // len(prompts[0]))


def shared_conversations(replicas: int, blocks: int) -> tuple[PrefixIndex, list[Chain]]:
    """Return an index of 500,000 other blocks and of conversations, each held by some replicas to different depths.

    Half of a conversation's holders have all of it; all conversations begin with a sixteenth that everybody holds.
    """
    rng, draw = random.Random(0), np.random.default_rng(0)
    index = PrefixIndex()
    rows = [index.add(f"replica-{number}") for number in range(replicas)]
    for _ in range(2000):
        index.apply(rng.choice(rows), KvStored(random_chain(draw, 250), ROOT))
    system = random_chain(draw, blocks // 16)
    for row in rows:
        index.apply(row, KvStored(system, ROOT))
    prompts = []
    for _ in range(64):
        prompt = system + random_chain(draw, blocks - len(system), system[-1])
        for number, row in enumerate(rng.sample(rows, 6)):
            depth = len(prompt) if number % 2 else rng.randint(len(system), len(prompt))
            index.apply(row, KvStored(prompt[:depth], ROOT))
        prompts.append(prompt)
    return index, prompts


def _apply_figures() -> Iterator[Figure]:
    fleet = Fleet(16, 4096, random.Random(0))
    news = [one for _ in range(6000) for one in fleet.serve()[1]]
    singly = [(replica, one) for replica, event in news[:20_000] for one in one_by_one(event)]
    blocks = sum(len(event.block_hashes) for _, event in news)
    yield Figure("KV events applied, as engines send them", applied_per_s(news), "blocks/CPU s", ">= 200000")
    yield Figure("KV events applied, one block each", applied_per_s(singly), "blocks/CPU s", ">= 200000")
    yield Figure("blocks in an event, as engines send them, mean", blocks / len(news), "blocks")


def applied_per_s(news: Sequence[tuple[int, KvEvent]]) -> float:
    """Return how many blocks of events a new index takes in, in a second of CPU time; the median of five."""
    rates = []
    for _ in range(5):
        index = PrefixIndex()
        for number in range(16):
            index.add(str(number))
        gc.collect()
        began = time.process_time()
        for row, event in news:
            index.apply(row, event)
        elapsed_s = time.process_time() - began
        rates.append(sum(len(event.block_hashes) for _, event in news) / elapsed_s)
    return median(rates)


def one_by_one(event: KvEvent) -> Iterator[KvEvent]:
    """Say the same in events of one block."""
    if isinstance(event, KvStored):
        for parent, block in zip((event.parent, *event.block_hashes), event.block_hashes, strict=False):
            yield KvStored((block,), parent)
    else:
        for block in event.block_hashes:
            yield KvRemoved((block,))


def bytes_per_block(replicas: int) -> float:
    """Return by how many bytes an index of a million blocks makes this process grow, for each of them.

    Conversations of 60 blocks, each held by one to four replicas to different depths.
    """
    rng, draw = random.Random(0), np.random.default_rng(0)
    index = PrefixIndex()
    rows = [index.add(f"replica-{number}") for number in range(replicas)]
    random_chain(draw, 60)
    gc.collect()
    before = _resident_bytes()
    while len(index) < 1_000_000:
        chain = random_chain(draw, 60)
        for number in range(rng.choice((1, 1, 2, 2, 3, 4))):
            index.apply(rng.choice(rows), KvStored(chain if not number else chain[: rng.randint(1, 60)], ROOT))
    gc.collect()
    return (_resident_bytes() - before) / len(index)


def _resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def forgetting_s() -> float:
    """Return the 99.9th percentile of an event's time, while a replica of 100,000 blocks in a million is forgotten."""
    rng, draw = random.Random(0), np.random.default_rng(0)
    index = PrefixIndex()
    rows = [index.add(f"replica-{number}") for number in range(10)]
    chains = [random_chain(draw, 100) for _ in range(10_000)]
    for number, chain in enumerate(chains):
        index.apply(rows[number % 10], KvStored(chain, ROOT))
        index.apply(rng.choice(rows[1:]), KvStored(chain[: rng.randint(1, 30)], ROOT))
    index.remove("replica-0")
    times: list[float] = []
    while len(times) < 5000:
        event = KvStored(random_chain(draw, 4), ROOT)
        began = time.perf_counter()
        index.apply(rows[1], event)
        times.append(time.perf_counter() - began)
    return sorted(times)[int(len(times) * 0.999)]


# How much is still found when the cap bites


class ReplicaCache:
    """A replica's KV cache: forgets what was used least recently, ends of chains first."""

    def __init__(self, blocks: int) -> None:
        self._room = blocks
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def hits(self, chain: Chain) -> int:
        """Return how many leading blocks are there."""
        return next((depth for depth, block in enumerate(chain) if block not in self._blocks), len(chain))

    def serve(self, chain: Chain) -> list[KvEvent]:
        """Compute and keep a chain."""
        known = self.hits(chain)
        for block in reversed(chain):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        removed = [self._blocks.popitem(last=False)[0] for _ in range(len(self._blocks) - self._room)]
        events: list[KvEvent] = [KvRemoved(tuple(removed))] if removed else []
        if known < len(chain):
            events.append(KvStored(chain[known:], chain[known - 1] if known else ROOT))
        return events


@dataclass
class Fleet:
    """Replicas that serve conversations, which begin with one of some system prompts; popular ones more often."""

    replicas: int
    cache_blocks: int
    rng: random.Random
    caches: list[ReplicaCache] = field(default_factory=list)
    _open: list[Chain] = field(default_factory=list)
    _systems: list[Chain] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._draw = np.random.default_rng(self.rng.getrandbits(32))
        self.caches = [ReplicaCache(self.cache_blocks) for _ in range(self.replicas)]
        self._systems = [random_chain(self._draw, self.rng.randint(16, 128)) for _ in range(12)]

    def serve(self) -> tuple[Chain, list[tuple[int, KvEvent]]]:
        """Let one request come and be served; return its prompt, and what was published because of it."""
        rng = self.rng
        while len(self._open) < 150 * self.replicas:
            self._open.append(self._systems[min(int(rng.paretovariate(0.8)) - 1, len(self._systems) - 1)])
        number = int(len(self._open) * rng.random() ** 2)  # some are in a hurry, others think for long
        before = self._open.pop(number)
        prompt = before + random_chain(self._draw, rng.randint(2, 20), before[-1])
        replica = max(rng.sample(range(self.replicas), 8), key=lambda one: self.caches[one].hits(prompt))
        news: list[KvEvent] = self.caches[replica].serve(prompt)
        whole = prompt
        for _ in range(rng.randint(1, 12)):  # the answer, a block at a time
            whole += random_chain(self._draw, 1, whole[-1])
            news += self.caches[replica].serve(whole)
        if rng.random() < 0.85:
            self._open.insert(number, whole)
        return prompt, [(replica, event) for event in news]


def recall(gateways: int, requests: int = 8000) -> dict[float, float]:
    """Return the share of the hit blocks that an index still knows, by its cap relative to what it would need.

    Args:
        gateways: Requests come to any of so many, each of which hears of all events.
        requests: The second half of them counts.
    """
    rng = random.Random(1)
    fleet = Fleet(16, 4096, random.Random(2))
    traffic = [fleet.serve() for _ in range(requests)]
    asked = [rng.randrange(gateways) == 0 for _ in traffic]
    truth, needed = _replay(traffic, asked, fleet.replicas, 4_000_000)
    return {cap: _replay(traffic, asked, fleet.replicas, max(1, int(needed * cap)))[0] / truth for cap in CAPS}


def _replay(
    traffic: Sequence[tuple[Chain, list[tuple[int, KvEvent]]]], asked: Sequence[bool], replicas: int, cap: int
) -> tuple[int, int]:
    """Return how many blocks the index found, on the best replica for each prompt, and how many it had at most."""
    index = PrefixIndex(cap)
    rows = [index.add(str(number)) for number in range(replicas)]
    found = most = 0
    for number, ((prompt, news), here) in enumerate(zip(traffic, asked, strict=True)):
        if here:
            hits = int(index.match(prompt).hit.max())
            found += hits if 2 * number >= len(traffic) else 0
        for replica, event in news:
            index.apply(rows[replica], event)
        most = max(most, len(index))
    return found, most


def _seen_by(gateways: int) -> str:
    return "one gateway" if gateways == 1 else f"one of {gateways} gateways"


def main() -> None:
    """Measure and print."""
    report = Report("routing_index", "python -m benchmarks.routing_index")
    for figure in measure():
        report.add(figure.name, figure.value, figure.unit, figure.hold)
    report.finish()


if __name__ == "__main__":
    main()
