"""No policy but `longest_prefix` starves a replica when all prompts share a prefix.

The real Router is driven with every policy; replicas are played by `Player`, which takes a request in, stores the
blocks of its prompt, and reports its load. Prompts begin with a system prompt that everybody shares; what follows is
new in each, and may be too short for a block of its own.
"""

from collections import Counter
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.core.blocks import ROOT, block_hashes
from serve.core.kv_events import HOST, KvStored
from serve.core.routing.load import LoadReport
from serve.core.routing.request import RouteRequest
from serve.core.routing.router import Router
from serve.core.routing.settings import POLICY_NAMES, make_policy, parse_policy

SIZE = 16
TURNS = 24  # requests for each replica, on average

POLICIES = [name for name in POLICY_NAMES if name != "longest_prefix"]


@dataclass
class Player:
    """A replica: the prompts that it computes, and what it has told of them."""

    name: str
    router: Router
    running: dict[int, RouteRequest] = field(default_factory=dict)
    accepted: list[int] = field(default_factory=list)

    def take(self, request: RouteRequest) -> None:
        self.running[request.route_id] = request
        self.accepted.append(request.route_id)

    def store(self, request: RouteRequest, tier: int = 0) -> None:
        if request.hashes:
            self.router.apply(self.name, [KvStored(tuple(request.hashes), ROOT, tier)])

    def end(self, route_id: int) -> None:
        del self.running[route_id]

    def report(self, now_s: float) -> None:
        blocks = sum(-(-request.prompt_tokens // SIZE) for request in self.running.values())
        tokens = sum(request.prompt_tokens for request in self.running.values())
        report = LoadReport(
            running=len(self.running),
            used_blocks=min(blocks, 1000),
            total_blocks=1000,
            committed_blocks=blocks,
            context_tokens=tokens,
            accepted=tuple(self.accepted),
        )
        self.accepted.clear()
        self.router.report(self.name, report, now_s)


@dataclass(frozen=True)
class Workload:
    """What the prompts are like.

    Attributes:
        replicas: How many there are.
        shared_tokens: Length of the system prompt.
        tail_tokens: Length of what follows it.
        seed: Of what is drawn.
    """

    replicas: int
    shared_tokens: int
    tail_tokens: int
    seed: int


workloads = st.builds(
    Workload,
    replicas=st.integers(2, 5),
    shared_tokens=st.integers(SIZE, 40 * SIZE),
    tail_tokens=st.sampled_from([1, 5, 3 * SIZE, 20 * SIZE]),
    seed=st.integers(0, 2**32),
)


class Scene:
    """A router, its replicas, and an endless supply of requests; counts who got how many of the latest."""

    def __init__(self, policy: str, workload: Workload) -> None:
        self.router = Router(make_policy(parse_policy(policy)), SIZE, seed=workload.seed)
        self.players = {f"r{number}": Player(f"r{number}", self.router) for number in range(workload.replicas)}
        for name in self.players:
            self.router.add(name, 0.0)
        self.num_requests = TURNS * workload.replicas
        self._rng = np.random.default_rng(workload.seed)
        self._shared = self._draw(workload.shared_tokens)
        self._tail_tokens = workload.tail_tokens
        self._numbers = count(1)
        self._got: list[str] = []

    def request(self) -> RouteRequest:
        tokens = np.concatenate((self._shared, self._draw(self._tail_tokens)))
        number = next(self._numbers)
        return RouteRequest(number, block_hashes(tokens, SIZE).tolist(), len(tokens), 32, session=f"user {number}")

    def route(self, request: RouteRequest, now_s: float) -> Player:
        decision = self.router.route(request, now_s)
        assert decision is not None
        self.router.commit(request, decision, now_s)
        player = self.players[decision.replica_id]
        player.take(request)
        self._got.append(player.name)
        return player

    def check(self) -> None:
        """Raise AssertionError if a replica got none of the second half of the requests."""
        latest = Counter(self._got[-self.num_requests // 2 :])
        assert set(latest) == set(self.players), f"of the latest requests, replicas got {dict(latest)}"

    def _draw(self, num_tokens: int) -> np.typing.NDArray[np.uint32]:
        return self._rng.integers(0, 2**32, num_tokens, dtype=np.uint32)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=3, deadline=None)
@given(workload=workloads)
def test_a_burst_reaches_every_replica(policy: str, workload: Workload) -> None:
    """Nothing ends, and nobody reports."""
    scene = Scene(policy, workload)
    for _ in range(scene.num_requests):
        scene.route(scene.request(), 1.0)
    scene.check()


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=3, deadline=None)
@given(workload=workloads, in_flight=st.integers(1, 40))
def test_steady_traffic_reaches_every_replica(policy: str, workload: Workload, in_flight: int) -> None:
    """Requests end in the order of their arrival; replicas store prompts and report after each."""
    scene = Scene(policy, workload)
    active: list[tuple[Player, RouteRequest]] = []
    for number in range(scene.num_requests):
        now_s = 0.02 * number
        request = scene.request()
        player = scene.route(request, now_s)
        player.store(request)
        active.append((player, request))
        if len(active) > in_flight:
            done, ended = active.pop(0)
            done.end(ended.route_id)
            done.report(now_s)
        player.report(now_s)
    scene.check()


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=3, deadline=None)
@given(workload=workloads, pause_s=st.sampled_from([0.01, 1.0, 100.0]))
def test_one_request_at_a_time_reaches_every_replica(policy: str, workload: Workload, pause_s: float) -> None:
    """Each request has ended before the next one comes: load never speaks."""
    scene = Scene(policy, workload)
    for number in range(scene.num_requests):
        now_s = pause_s * number
        request = scene.request()
        player = scene.route(request, now_s)
        player.store(request)
        player.report(now_s)
        scene.router.settle(request.route_id)
        player.end(request.route_id)
        player.report(now_s)
    scene.check()


@pytest.mark.parametrize("tier", [0, HOST])
@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=4, deadline=None)
@given(workload=workloads)
def test_a_warm_replica_does_not_keep_the_cold_ones_idle(policy: str, tier: int, workload: Workload) -> None:
    """One replica has had the system prompt for long, all others are new; one request at a time."""
    scene = Scene(policy, workload)
    next(iter(scene.players.values())).store(scene.request(), tier)
    for number in range(scene.num_requests):
        request = scene.request()
        player = scene.route(request, 0.5 * number)
        player.store(request)
        scene.router.settle(request.route_id)
        player.end(request.route_id)
        player.report(0.5 * number)
    scene.check()


def test_the_longest_prefix_does_starve() -> None:
    """The scenes can tell."""
    scene = Scene("longest_prefix", Workload(3, 100 * SIZE, 1, 0))
    for _ in range(scene.num_requests):
        request = scene.request()
        scene.route(request, 1.0).store(request)
    with pytest.raises(AssertionError, match="got"):
        scene.check()
