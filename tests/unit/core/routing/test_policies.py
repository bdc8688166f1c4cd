"""Each policy's formula against numbers computed by hand, and the laws that hold for many."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.core.routing.decision import FleetView, PrefixMatch, Scores
from serve.core.routing.policies.affinity import LoraAffinityPolicy, SessionAffinityPolicy
from serve.core.routing.policies.aibrix import AibrixPolicy
from serve.core.routing.policies.dynamo import DynamoPolicy
from serve.core.routing.policies.least_load import (
    LeastRequestsPolicy,
    LeastTokensPolicy,
    PowerOfTwoPolicy,
    RandomPolicy,
    RoundRobinPolicy,
)
from serve.core.routing.policies.llm_d import LlmdPolicy
from serve.core.routing.policies.lmetric import LmetricPolicy
from serve.core.routing.policies.longest_prefix import LongestPrefixPolicy
from serve.core.routing.policies.ray_llm_prefix import RayLlmPrefixPolicy
from serve.core.routing.policies.sglang import SglangPolicy
from serve.core.routing.policies.trtllm_serve import TrtllmServePolicy
from serve.core.routing.policy import Policy, decide
from serve.core.routing.request import RouteRequest
from serve.core.routing.settings import POLICY_NAMES, make_policy, parse_policy
from tests.unit.core.routing.views import match, request, view

PEERS = [name for name in POLICY_NAMES if name != "predictive"]
BLIND = (RoundRobinPolicy(), RandomPolicy(), PowerOfTwoPolicy(), LeastRequestsPolicy(), LeastTokensPolicy())


def score(policy: Policy, wanted: RouteRequest, fleet: FleetView, found: PrefixMatch | None = None) -> Scores:
    hits = found or match([0.0] * len(fleet), -(-wanted.prompt_tokens // fleet.tokens_per_block))
    return policy.score(wanted, fleet, hits, random.Random(0))


def chosen(policy: Policy, wanted: RouteRequest, fleet: FleetView, found: PrefixMatch | None = None) -> str:
    hits = found or match([0.0] * len(fleet), -(-wanted.prompt_tokens // fleet.tokens_per_block))
    return decide(policy, wanted, fleet, hits, random.Random(0)).replica_id


# Load alone


def test_round_robin_takes_who_waited_longest() -> None:
    assert chosen(RoundRobinPolicy(), request(32), view(3, last_routed=[7, 5, 6])) == "r1"
    assert chosen(RoundRobinPolicy(), request(32), view(3, last_routed=[7, -1, -1])) == "r1"


def test_random_takes_all_alike() -> None:
    rng, fleet = random.Random(1), view(4, running=[9, 0, 0, 0])
    got = Counter(decide(RandomPolicy(), request(32), fleet, match([0] * 4, 2), rng).replica_id for _ in range(4000))
    assert min(got.values()) > 850


def test_power_of_two_never_takes_the_busiest_and_the_idlest_of_two_always() -> None:
    rng, fleet = random.Random(1), view(4, running=[0, 1, 2, 3])
    got = Counter(
        decide(PowerOfTwoPolicy(), request(32), fleet, match([0] * 4, 2), rng).replica_id for _ in range(6000)
    )
    # Of the six pairs, r0 is in three, r1 in two more, and r2 wins one.
    assert got["r3"] == 0
    assert got["r0"] / 6000 == pytest.approx(3 / 6, abs=0.03)
    assert got["r1"] / 6000 == pytest.approx(2 / 6, abs=0.03)


def test_least_requests_counts_all_in_hand() -> None:
    assert chosen(LeastRequestsPolicy(), request(32), view(3, running=[3, 1, 1], waiting=[0, 3, 1])) == "r2"


def test_least_tokens_counts_prompts_to_compute_and_context() -> None:
    fleet = view(3, queued_prefill_tokens=[500, 0, 100], context_tokens=[0, 450, 300])
    assert score(LeastTokensPolicy(), request(32), fleet).cost.tolist() == [500, 450, 400]


def test_longest_prefix_looks_at_nothing_else() -> None:
    fleet = view(3, running=[0, 0, 99], queued_prefill_tokens=[0, 0, 9999])
    assert chosen(LongestPrefixPolicy(), request(160), fleet, match([3, 4, 5], 10, common=10)) == "r2"


# Affinity


def test_a_session_stays_at_home_and_few_move_when_replicas_come() -> None:
    policy, sessions = SessionAffinityPolicy(), [f"user {number}" for number in range(600)]
    before = {name: chosen(policy, request(32, session=name), view(5)) for name in sessions}
    after = {name: chosen(policy, request(32, session=name), view(6)) for name in sessions}
    assert min(Counter(before.values()).values()) > 600 / 5 / 2
    moved = {after[name] for name in sessions if after[name] != before[name]}
    assert moved == {"r5"}
    assert sum(after[name] == "r5" for name in sessions) == pytest.approx(100, abs=35)


def test_a_session_leaves_an_overloaded_home_and_comes_back() -> None:
    policy, wanted = SessionAffinityPolicy(overload_factor=1.5, overload_requests=4), request(32, session="s")
    home = int(chosen(policy, wanted, view(4))[1:])
    load = [2.0] * 4
    load[home] = 7.0  # mean 3.25: not above 3.25 + 4
    assert chosen(policy, wanted, view(4, running=load)) == f"r{home}"
    load[home] = 8.0  # mean 3.5: above 7.5 and 5.25
    elsewhere = score(policy, wanted, view(4, running=load))
    assert elsewhere.rule == "home_overloaded"
    second = chosen(policy, wanted, view(4, running=load))
    assert second != f"r{home}"
    # Where it goes does not depend on small differences between the others.
    assert {chosen(policy, wanted, view(4, running=load, waiting=[0, k, 0, k])) for k in range(2)} == {second}


def test_without_a_session_the_fewest_requests_decide() -> None:
    assert chosen(SessionAffinityPolicy(), request(32), view(3, running=[3, 1, 2])) == "r1"


def test_an_adapter_has_so_many_homes_and_the_least_busy_serves() -> None:
    policy, wanted = LoraAffinityPolicy(homes=2), request(32, lora="sql")
    homes = np.flatnonzero(score(policy, wanted, view(6)).terms["home"])
    assert len(homes) == 2
    load = [1.0] * 6
    load[homes[0]] = 3.0
    assert chosen(policy, wanted, view(6, running=load)) == f"r{homes[1]}"
    load[homes[0]] = load[homes[1]] = 30.0
    assert int(chosen(policy, wanted, view(6, running=load))[1:]) not in homes
    assert score(policy, wanted, view(6, running=load)).rule == "homes_overloaded"


def test_adapters_spread_and_the_base_model_goes_anywhere() -> None:
    policy, fleet = LoraAffinityPolicy(homes=1), view(4)
    got = Counter(chosen(policy, request(32, lora=f"adapter {number}"), fleet) for number in range(200))
    assert min(got.values()) > 25
    assert chosen(policy, request(32), view(3, running=[3, 1, 2])) == "r1"


# Dynamo: blocks of 16 tokens, a prompt of 20 blocks


def test_dynamo_adds_prefill_and_decode_blocks() -> None:
    fleet = view(2, queued_prefill_tokens=[160, 0], active_blocks=[10, 50], total_blocks=[1000, 1000])
    scores = score(DynamoPolicy(), request(320), fleet, match([16, 4], 20))
    assert scores.terms["prefill_blocks"].tolist() == [30 - 16, 20 - 4]
    assert scores.cost.tolist() == [14 + 30, 16 + 70]
    scaled = score(DynamoPolicy(prefill_load_scale=2.0), request(320), fleet, match([16, 4], 20))
    assert scaled.cost.tolist() == [28 + 30, 32 + 70]


def test_dynamo_credits_slower_tiers_with_less() -> None:
    found = match([16], 20, host=[8], disk=[4])
    # 4 on the GPU, 8 at 0.75, 4 at 0.25
    assert score(DynamoPolicy(), request(320), view(1), found).terms["prefill_blocks"].tolist() == [20 - 11]
    # The common ones count in full: of the 6 others all are told to be on the host.
    found = match([16], 20, host=[8], common=10)
    assert score(DynamoPolicy(), request(320), view(1), found).terms["prefill_blocks"].tolist() == [20 - 10 - 4.5]


def test_dynamo_decays_credit_with_the_backlog_above_the_shortest() -> None:
    fleet = view(2, queued_prefill_tokens=[480, 160])
    scores = score(DynamoPolicy(overlap_credit_decay=1.0), request(320), fleet, match([15, 15], 20))
    # r0 has one prompt's worth above r1: half the credit.
    assert scores.terms["prefill_blocks"].tolist() == [50 - 7.5, 30 - 15]


def test_dynamo_may_charge_requests() -> None:
    scores = score(DynamoPolicy(active_request_weight=3.0), request(16), view(2, running=[2, 0]))
    assert (scores.cost[0] - scores.cost[1]) == 6.0


def test_dynamo_draws_by_softmax_of_the_normalised_cost() -> None:
    policy, rng, fleet = DynamoPolicy(temperature=0.5), random.Random(3), view(3, active_blocks=[0, 5, 10])
    got = Counter(decide(policy, request(16), fleet, match([0] * 3, 1), rng).replica_id for _ in range(8000))
    weights = np.exp(-np.array([0.0, 0.5, 1.0]) / 0.5)
    for number, share in enumerate(weights / weights.sum()):
        assert got[f"r{number}"] / 8000 == pytest.approx(share, abs=0.02)


# llm-d: a prompt of 10 blocks


def test_llm_d_weighs_prefix_queue_and_kv_use() -> None:
    fleet = view(3, waiting=[4, 1, 2], active_blocks=[50, 20, 0], total_blocks=[100, 100, 100])
    scores = score(LlmdPolicy(), request(160), fleet, match([5, 0, 2], 10))
    assert scores.terms["prefix"].tolist() == [1.5, 0.0, pytest.approx(0.6)]
    assert scores.terms["queue"].tolist() == [0.0, 2.0, pytest.approx(2 * 2 / 3)]
    assert scores.terms["kv"].tolist() == [1.0, 1.6, 2.0]
    assert (-scores.cost).tolist() == pytest.approx([2.5, 3.6, 0.6 + 4 / 3 + 2.0])


def test_llm_d_keeps_to_who_holds_most_of_the_prompt() -> None:
    fleet = view(3, waiting=[40, 0, 0], queued_prefill_tokens=[200_000, 0, 0])
    scores = score(LlmdPolicy(), request(160), fleet, match([8, 7, 0], 10))
    assert scores.rule == "affinity"
    assert scores.cost.argmin() == 0


def test_llm_d_leaves_them_when_they_would_be_too_slow() -> None:
    # 18 s at 15,928 tokens/s are 286,704 tokens.
    for queued, best in ((286_704, 0), (286_705, 1)):
        fleet = view(3, waiting=[40, 0, 1], queued_prefill_tokens=[queued, 0, 0], total_blocks=[100.0] * 3)
        found = match([8, 7, 0], 10)
        assert score(LlmdPolicy(), request(160), fleet, found).cost.argmin() == best
    measured = LlmdPolicy(prefill_tokens_per_s=0.0, max_ttft_penalty_s=1.0)
    fleet = view(2, waiting=[9, 0], queued_prefill_tokens=[1000, 0], prefill_token_s=[2e-3, 1.0])
    assert score(measured, request(160), fleet, match([8, 0], 10)).rule == "affinity_too_slow"


# SGLang's gateway


def test_sglang_follows_the_longest_match_to_its_least_busy_holder() -> None:
    fleet = view(4, running=[5, 9, 7, 0])
    assert chosen(SglangPolicy(), request(160), fleet, match([3, 6, 6, 0], 10)) == "r2"


def test_sglang_needs_a_match_above_its_threshold() -> None:
    fleet = view(2, running=[5, 0])
    assert score(SglangPolicy(), request(160), fleet, match([3, 0], 10)).rule == "no_match"
    assert chosen(SglangPolicy(), request(160), fleet, match([3, 0], 10)) == "r1"
    assert chosen(SglangPolicy(), request(160), fleet, match([4, 0], 10)) == "r0"


@pytest.mark.parametrize(
    ("loads", "best"),
    [
        ([128, 0], "r0"),  # mean 64: above 96, not above 128
        ([130, 0], "r1"),  # mean 65: above 97.5 and 129
        ([400, 300], "r0"),  # mean 350: above neither
    ],
)
def test_sglang_spills_above_both_margins(loads: list[float], best: str) -> None:
    assert chosen(SglangPolicy(), request(160), view(2, running=loads), match([10, 0], 10)) == best


# trtllm-serve


def test_trtllm_serve_subtracts_load_from_match() -> None:
    # 161 tokens without the last one are 10 blocks.
    scores = score(TrtllmServePolicy(), request(161), view(2, running=[32, 8], waiting=[0, 8]), match([8, 2], 11))
    assert (-scores.cost).tolist() == pytest.approx([0.8 - 0.5, 0.2 - 0.25])
    assert score(TrtllmServePolicy(), request(1), view(1)).cost.tolist() == [0.0]


# AIBrix


def test_aibrix_takes_the_best_match_within_one_sigma() -> None:
    # Mean 3, sample sigma sqrt((4 + 1 + 0 + 9 + 4) / 4) = 2.12: up to 5 requests.
    fleet = view(5, running=[5, 2, 3, 0, 5], waiting=[0, 0, 0, 0, 0])
    assert chosen(AibrixPolicy(), request(160), fleet, match([9, 5, 0, 1, 9], 10)) in ("r0", "r4")
    fleet = view(5, running=[6, 2, 3, 0, 4])  # mean 3, sigma 2.24: 6 is too many
    assert chosen(AibrixPolicy(), request(160), fleet, match([9, 5, 0, 1, 4], 10)) == "r1"


def test_aibrix_breaks_equal_matches_by_requests_in_whole_percent() -> None:
    fleet = view(2, running=[2, 1])
    assert chosen(AibrixPolicy(), request(1000), fleet, match([509, 501], 1000)) == "r1"
    assert chosen(AibrixPolicy(), request(1000), fleet, match([510, 501], 1000)) == "r0"


def test_aibrix_goes_to_the_idlest_when_out_of_balance() -> None:
    fleet = view(3, running=[9, 0, 0])
    assert chosen(AibrixPolicy(), request(160), fleet, match([9, 0, 2], 10)) == "r2"
    assert chosen(AibrixPolicy(), request(160), view(3, running=[8, 8, 0]), match([9, 0, 0], 10)) == "r0"
    assert score(AibrixPolicy(), request(160), fleet).rule == "imbalanced"
    assert score(AibrixPolicy(), request(160), view(2)).rule == "no_match"


# LMetric and Ray


def test_lmetric_multiplies() -> None:
    fleet = view(2, queued_prefill_tokens=[100, 0], running=[1, 3], waiting=[1, 0])
    assert score(LmetricPolicy(), request(160), fleet, match([5, 0], 10)).cost.tolist() == [180 * 3, 160 * 4]


def test_ray_follows_a_match_of_a_tenth_to_the_shortest_queue() -> None:
    fleet = view(4, running=[5, 3, 0, 0])
    assert chosen(RayLlmPrefixPolicy(), request(160), fleet, match([1, 1, 0, 0], 10)) == "r1"
    assert score(RayLlmPrefixPolicy(), request(161), fleet, match([1, 1, 0, 0], 11)).rule == "no_match"
    limited = RayLlmPrefixPolicy(imbalanced_threshold=4)
    assert score(limited, request(160), fleet, match([9, 0, 0, 0], 10)).rule == "imbalanced"


# Laws


columns = st.integers(0, 30).map(float)


@st.composite
def situations(draw: st.DrawFn) -> tuple[FleetView, PrefixMatch, RouteRequest]:
    count = draw(st.integers(1, 6))
    several = st.lists(columns, min_size=count, max_size=count)
    prompt_blocks = draw(st.integers(1, 40))
    held = st.lists(st.integers(0, prompt_blocks - 1).map(float), min_size=count, max_size=count)
    fleet = view(
        count,
        running=draw(several),
        waiting=draw(several),
        queued_prefill_tokens=[64.0 * blocks for blocks in draw(several)],
        active_blocks=draw(several),
        total_blocks=[40.0] * count,
        context_tokens=[16.0 * blocks for blocks in draw(several)],
        last_routed=[float(number) for number in draw(st.permutations(range(count)))],
    )
    found = match(draw(held), prompt_blocks, common=draw(st.integers(0, prompt_blocks - 1)))
    return fleet, found, request(16 * prompt_blocks, session=draw(st.sampled_from(["", "a"])), lora="x")


def best(policy: Policy, situation: tuple[FleetView, PrefixMatch, RouteRequest]) -> set[str]:
    fleet, found, wanted = situation
    cost = policy.score(wanted, fleet, found, random.Random(5)).cost
    return {fleet.replica_ids[row] for row in np.flatnonzero(cost == cost.min())}


def rearranged(
    situation: tuple[FleetView, PrefixMatch, RouteRequest], order: list[int]
) -> tuple[FleetView, PrefixMatch, RouteRequest]:
    fleet, found, wanted = situation
    moved = {
        name: getattr(fleet, name)[order] for name in fleet.__slots__ if isinstance(getattr(fleet, name), np.ndarray)
    }
    ids = tuple(fleet.replica_ids[row] for row in order)
    hits = PrefixMatch(
        found.hit_blocks[order],
        found.host_blocks[order],
        found.disk_blocks[order],
        found.prompt_blocks,
        found.common_blocks,
    )
    return replaced(fleet, replica_ids=ids, **moved), hits, wanted


def replaced(fleet: FleetView, **changes: object) -> FleetView:
    kept = {name: getattr(fleet, name) for name in fleet.__slots__}
    return FleetView(**{**kept, **changes})


@pytest.mark.parametrize("name", [name for name in PEERS if name not in ("random", "power_of_two", "ray_llm_prefix")])
@settings(max_examples=25, deadline=None)
@given(situation=situations(), data=st.data())
def test_the_order_of_the_candidates_does_not_matter(
    name: str, situation: tuple[FleetView, PrefixMatch, RouteRequest], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(situation[0]))))
    policy = make_policy(parse_policy(name))
    assert best(policy, rearranged(situation, order)) == best(policy, situation)


@pytest.mark.parametrize("name", PEERS)
@settings(max_examples=25, deadline=None)
@given(situation=situations(), data=st.data())
def test_more_load_makes_no_replica_more_attractive(
    name: str, situation: tuple[FleetView, PrefixMatch, RouteRequest], data: st.DataObject
) -> None:
    fleet, found, wanted = situation
    row = data.draw(st.integers(0, len(fleet) - 1))
    more = np.eye(len(fleet))[row]
    policy = make_policy(parse_policy(name))
    if fleet.replica_ids[row] not in best(policy, situation):
        busier = replaced(
            fleet,
            waiting=fleet.waiting + more,
            queued_prefill_tokens=fleet.queued_prefill_tokens + 160 * more,
            active_blocks=fleet.active_blocks + 10 * more,
        )
        assert fleet.replica_ids[row] not in best(policy, (busier, found, wanted))


@pytest.mark.parametrize("name", PEERS)
@settings(max_examples=25, deadline=None)
@given(situation=situations(), data=st.data())
def test_more_hits_make_no_replica_less_attractive(
    name: str, situation: tuple[FleetView, PrefixMatch, RouteRequest], data: st.DataObject
) -> None:
    fleet, found, wanted = situation
    row = data.draw(st.integers(0, len(fleet) - 1))
    hits = found.hit_blocks.copy()
    hits[row] = data.draw(st.integers(int(hits[row]), found.prompt_blocks - 1))
    # With llm-d's filter, a new member of the filtered set changes how queues compare.
    policy = LlmdPolicy(affinity_threshold=0.0) if name == "llm_d" else make_policy(parse_policy(name))
    if fleet.replica_ids[row] in best(policy, situation):
        more = PrefixMatch(hits, found.host_blocks, found.disk_blocks, found.prompt_blocks, found.common_blocks)
        assert fleet.replica_ids[row] in best(policy, (fleet, more, wanted))


@pytest.mark.parametrize("name", [name for name in PEERS if name != "longest_prefix"])
@settings(max_examples=25, deadline=None)
@given(situation=situations())
def test_common_blocks_earn_nobody_anything(name: str, situation: tuple[FleetView, PrefixMatch, RouteRequest]) -> None:
    fleet, found, wanted = situation
    found = match([0.0] * len(fleet), found.prompt_blocks, common=found.common_blocks)
    policy = make_policy(parse_policy(name))
    nobody = best(policy, (fleet, found, wanted))
    held = np.zeros(len(fleet))
    held[0] = found.common_blocks
    one = PrefixMatch(held, np.zeros(len(fleet)), np.zeros(len(fleet)), found.prompt_blocks, found.common_blocks)
    assert best(policy, (fleet, one, wanted)) == nobody


@pytest.mark.parametrize("name", PEERS)
@settings(max_examples=25, deadline=None)
@given(situation=situations())
def test_costs_are_numbers_and_terms_are_columns(
    name: str, situation: tuple[FleetView, PrefixMatch, RouteRequest]
) -> None:
    fleet, found, wanted = situation
    scores = make_policy(parse_policy(name)).score(wanted, fleet, found, random.Random(0))
    assert np.isfinite(scores.cost).all()
    assert all(term.shape == scores.cost.shape and np.isfinite(term).all() for term in scores.terms.values())


@pytest.mark.parametrize("policy", BLIND, ids=lambda policy: policy.name)
@settings(max_examples=25, deadline=None)
@given(situation=situations())
def test_blind_policies_do_not_see_hits(policy: Policy, situation: tuple[FleetView, PrefixMatch, RouteRequest]) -> None:
    fleet, found, wanted = situation
    assert best(policy, situation) == best(policy, (fleet, match([0.0] * len(fleet), found.prompt_blocks), wanted))
