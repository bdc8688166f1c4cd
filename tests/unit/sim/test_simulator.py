"""Requests through gateways and replicas: nothing is lost, and times are what can be told by hand."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.core.routing.fairness import FairnessSettings
from serve.core.routing.policy import Policy
from sim.options import SimOptions
from sim.outcome import Outcome
from sim.policies import parse_candidate
from sim.simulator import Simulation, simulate
from sim.workload import SimRequest
from tests.unit.sim.fleets import SIZE, engine, request, workloads

QUICK = SimOptions(delay_s=1e-3)
POLICIES = ("round_robin", "power_of_two", "longest_prefix", "dynamo", "predictive")


def policy(label: str) -> Policy:
    return parse_candidate(label).make()


def test_two_replicas_by_hand() -> None:
    workload = [
        request(0.0, 100, 3),  # to replica 0
        request(0.0, 200, 1, text=1),  # to replica 1
        request(0.05, 100, 2),  # to replica 0 again, whose cache will hold 9 of its blocks that count
    ]
    outcome = simulate(workload, [engine(), engine()], policy("round_robin"), QUICK)
    assert outcome.replica.tolist() == [0, 1, 0]
    # Replica 0: the first prompt until 0.101; then its second token and what is left of the third request's prompt,
    # together, until 0.211; then a token of each until 0.311. Each arrives and is seen a millisecond later.
    assert outcome.ttft_s == pytest.approx([0.102, 0.202, 0.162])
    assert outcome.end_s == pytest.approx([0.312, 0.202, 0.312])
    assert outcome.tpot_s[[0, 2]] == pytest.approx([0.105, 0.1])
    assert math.isnan(outcome.tpot_s[1])
    assert outcome.queue_s == pytest.approx([0.0, 0.0, 0.05])
    assert outcome.cached_tokens.tolist() == [0, 0, 90]
    assert outcome.busy_s == pytest.approx([0.31, 0.2])
    assert outcome.steps.tolist() == [3, 1]
    assert outcome.end_of_all_s == pytest.approx(0.312)


@pytest.mark.parametrize(("arrival_s", "chosen"), [(0.1015, 1), (0.1025, 0)])
def test_a_gateway_knows_of_a_cached_block_when_the_network_has_brought_the_news(arrival_s: float, chosen: int) -> None:
    # The first prompt is complete at 0.101, which reaches the gateway at 0.102.
    workload = [request(0.0, 100, 50), request(arrival_s, 100, 1)]
    outcome = simulate(workload, [engine(), engine()], policy("longest_prefix"), QUICK)
    assert outcome.replica.tolist() == [0, chosen]


def test_a_replica_that_is_idle_for_long_is_not_doubted() -> None:
    workload = [request(0.0, 200, 1), request(0.5, 200, 1, text=1), request(60.0, 200, 1)]
    outcome = simulate(workload, [engine(), engine()], policy("predictive"), QUICK)
    assert outcome.replica[2] == outcome.replica[0]
    assert outcome.cached_tokens[2] == 190


def test_another_gateway_hears_of_load_from_the_replica_only() -> None:
    # Twenty requests at once: a gateway counts its own at once, so each of four has its own idea of what is idle.
    workload = [request(0.0, 100, 1, text=number) for number in range(20)]
    spread = {
        gateways: np.bincount(
            simulate(workload, [engine()] * 5, policy("least_requests"), SimOptions(gateways=gateways, seed=3)).replica,
            minlength=5,
        )
        for gateways in (1, 4)
    }
    assert spread[1].tolist() == [4] * 5
    assert spread[4].max() > 4
    # 100 ms later they know of each other's.
    later = [request(0.0, 100, 500, text=n) for n in range(5)] + [request(0.2 + n, 100, 500, text=9) for n in range(5)]
    outcome = simulate(later, [engine()] * 10, policy("least_requests"), SimOptions(gateways=2, seed=3))
    assert sorted(outcome.replica[5:].tolist()) == sorted(set(range(10)) - set(outcome.replica[:5].tolist()))[:5]


@pytest.mark.parametrize(("max_waiting", "third"), [(1, -1), (2, 1)])
def test_a_refused_request_goes_to_the_next_replica_or_in_the_end_nowhere(max_waiting: int, third: int) -> None:
    fleet = [engine(max_batch_size=1, max_waiting=waiting) for waiting in (0, max_waiting)]
    workload = [request(0.0, 100, 1, text=number) for number in range(4)]
    outcome = simulate(workload, fleet, policy("round_robin"), QUICK)
    # The third is refused by replica 0 and goes to replica 1, where the second is computed and the fourth waits.
    assert outcome.replica.tolist() == [0, 1, third, 1]
    assert outcome.attempts.tolist() == [1, 1, 2, 1]
    assert outcome.first_token_s[3] == pytest.approx(0.001 + 0.2 + 0.001)
    assert outcome.first_token_s[2] == pytest.approx(0.001 + 0.3 + 0.001 if third >= 0 else math.nan, nan_ok=True)


def test_what_can_never_fit_is_refused_and_counted() -> None:
    workload = [request(0.0, 95, 5), request(0.1, 100_000, 5), request(0.2, 95, 5)]
    outcome = simulate(workload, [engine(total_blocks=12)], policy("round_robin"), QUICK)
    assert outcome.served.tolist() == [True, False, True]
    assert outcome.attempts.tolist() == [1, 0, 1]


def test_a_replica_too_small_for_a_request_refuses_it_and_a_larger_one_takes_it() -> None:
    workload = [request(0.0, 500, 5)]
    outcome = simulate(workload, [engine(total_blocks=12), engine()], policy("round_robin"), QUICK)
    assert (outcome.replica[0], outcome.attempts[0]) == (1, 2)


def test_clients_ask_for_the_longest_output_of_the_trace_unless_they_name_a_limit() -> None:
    # 20 blocks. A prompt takes 5 of them, and 10 or 1 are promised to its output: one request at a time, or both.
    roomy = [request(0.0, 50, 3, text=0), request(0.0, 50, 3, text=1), request(1.0, 50, 101, text=2)]
    strict = [request(0.0, 50, 3, text=number, max_tokens=10) for number in range(2)]
    one, other = (
        simulate(workload, [engine(total_blocks=20)], policy("round_robin"), QUICK) for workload in (roomy, strict)
    )
    assert one.queue_s[1] == pytest.approx(0.25)  # a prompt of 50 ms and two steps of 100 ms
    assert other.queue_s[1] == pytest.approx(0.05)


def test_output_is_reused_if_its_hashes_are_known() -> None:
    first = SimRequest(0.0, 50, 31, tuple(range(1, 6)), output_hashes=(6, 7, 8))
    second = SimRequest(10.0, 95, 1, tuple(range(1, 10)))
    known, unknown = (
        simulate([start, second], [engine()], policy("round_robin"), QUICK).cached_tokens[1]
        for start in (first, SimRequest(0.0, 50, 31, tuple(range(1, 6))))
    )
    assert (known, unknown) == (80, 50)


@settings(max_examples=60)
@given(
    workload=workloads(),
    label=st.sampled_from(POLICIES),
    gateways=st.integers(1, 3),
    replicas=st.integers(1, 4),
    total_blocks=st.integers(20, 80),
    max_waiting=st.integers(0, 6),
    scheduling=st.sampled_from(["guaranteed_no_evict", "max_utilization"]),
)
def test_every_request_ends_or_is_refused_and_gateways_learn_the_truth(
    workload: Sequence[SimRequest],
    label: str,
    gateways: int,
    replicas: int,
    total_blocks: int,
    max_waiting: int,
    scheduling: str,
) -> None:
    settings_of_all = engine(
        total_blocks=total_blocks, max_batch_size=4, max_waiting=max_waiting, scheduling=scheduling
    )
    options = SimOptions(gateways=gateways, max_attempts=2)
    simulation = Simulation(workload, [settings_of_all] * replicas, policy(label), options)
    outcome = simulation.run()
    check_times(outcome, options.delay_s)
    served = outcome.served
    generated = sum(replica.timeline.scheduler.decoding.total_tokens for replica in simulation.replicas)
    assert generated == outcome.output_tokens[served].sum()
    assert (outcome.attempts[served] >= 1).all()
    assert (outcome.attempts <= 2).all()

    simulation.news.deliver(math.inf)
    for gateway in simulation.gateways:
        gateway.catch_up(math.inf)
        view = gateway.router.fleet.view(outcome.end_of_all_s + 100.0)
        for column in (view.running, view.waiting, view.queued_prefill_tokens, view.committed_blocks):
            assert column.tolist() == [0.0] * replicas
        for one in workload:
            hits = gateway.router.index.match(one.hashes).hit
            for replica in simulation.replicas:
                held = replica.timeline.scheduler.pool.hit_blocks(one.hashes, len(one.hashes))
                assert hits[gateway.router.index.row(replica.name)] == held


def check_times(outcome: Outcome, delay_s: float) -> None:
    served = outcome.served
    assert np.isfinite(outcome.end_s[served]).all()
    assert np.isnan(outcome.end_s[~served]).all()
    assert (outcome.ttft_s[served] >= 2 * delay_s - 1e-12).all()
    assert (outcome.end_s[served] >= outcome.first_token_s[served]).all()
    assert (outcome.queue_s[served] >= 0.0).all()
    assert (outcome.cached_tokens[served] < outcome.prompt_tokens[served]).all()
    assert (outcome.cached_tokens % SIZE == 0).all()


@given(workload=workloads(), label=st.sampled_from(POLICIES), seed=st.integers(0, 5))
@settings(max_examples=20)
def test_the_same_arguments_give_the_same_outcome(workload: Sequence[SimRequest], label: str, seed: int) -> None:
    one, other = (
        simulate(workload, [engine()] * 3, policy(label), SimOptions(gateways=2, seed=seed)) for _ in range(2)
    )
    for name, column in vars(one).items():
        np.testing.assert_array_equal(column, getattr(other, name))


def test_another_seed_draws_others() -> None:
    workload = [request(0.01 * number, 100, 1, text=number) for number in range(50)]
    one, other = (simulate(workload, [engine()] * 4, policy("random"), SimOptions(seed=seed)) for seed in (1, 2))
    assert one.replica.tolist() != other.replica.tolist()


# A replica that is full when prompts there take more than a second, which is 20,000 tokens, and a request to learn it.
PLENTY = engine(prefill_tokens_per_s=20_000.0, total_blocks=100_000)
WARM_UP = request(0.0, 40_000, 1, text=99)


def test_tenants_take_turns_while_all_replicas_are_full() -> None:
    flood = [replace(request(3.0, 10_000, 1, text=number), tenant="flood") for number in range(20)]
    modest = [replace(request(3.01, 10_000, 1, text=90 + number), tenant="modest") for number in range(3)]
    fair, unfair = (
        simulate(
            [WARM_UP, *flood, *modest],
            [PLENTY],
            policy("round_robin"),
            SimOptions(fairness=FairnessSettings(enabled=enabled)),
        )
        for enabled in (True, False)
    )
    # Half a second each. Some of the flood are sent at once, and then every other one is the modest tenant's.
    assert unfair.end_s[21:].min() > 3.0 + 20 * 0.5
    assert fair.end_s[21:].max() < 3.0 + 13 * 0.5
    assert fair.end_of_all_s == pytest.approx(unfair.end_of_all_s, abs=0.2)
    assert (fair.queue_s[21:] < 5.0).all()


def test_who_waits_too_long_is_refused_and_so_is_who_comes_to_a_full_queue() -> None:
    workload = [WARM_UP, *(request(3.0, 40_000, 1, text=number) for number in range(8))]

    def served(**limits: float) -> int:
        shared = {"weights": {"somebody": 1.0}, **limits}  # else nobody waits who has no rival
        options = SimOptions(fairness=FairnessSettings.model_validate(shared))
        outcome = simulate(workload, [PLENTY], policy("round_robin"), options)
        assert outcome.attempts.tolist() == outcome.served.astype(int).tolist()
        return int(outcome.served.sum())

    assert served() == 9
    assert 1 < served(max_wait_s=0.5) < served(max_wait_s=5.0) < 9
    assert 1 < served(max_queued=1) < served(max_queued=3) < 9


def test_progress_is_told() -> None:
    told: list[tuple[int, float]] = []
    workload = [request(0.01 * number, 20, 1, text=number) for number in range(600)]
    simulate(workload, [engine()] * 4, policy("round_robin"), on_progress=lambda done, at_s: told.append((done, at_s)))
    assert [done for done, _ in told] == [256, 512, 600]
    assert [at_s for _, at_s in told] == sorted(at_s for _, at_s in told)


def test_fleets_must_agree_on_the_block_size() -> None:
    with pytest.raises(ValueError, match=r"tokens_per_block=\[10, 20\]"):
        simulate([], [engine(), engine(tokens_per_block=20)], policy("round_robin"))
    with pytest.raises(ValueError, match="one engine or more"):
        simulate([], [], policy("round_robin"))


def test_no_requests_are_served_at_once() -> None:
    assert simulate([], [engine()], policy("round_robin")).end_of_all_s == 0.0
