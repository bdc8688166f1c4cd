"""The predictive policy: its formula by hand, and what it must never do."""

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.core.routing.decision import FleetView, PrefixMatch, Scores
from serve.core.routing.policies.predictive import PredictivePolicy
from serve.core.routing.policy import decide
from tests.unit.core.routing.views import match, request, view

POLICY = PredictivePolicy()
NO_PAIRS = {"prefill_pair_s": [0.0, 0.0]}


def score(view_: FleetView, match_: PrefixMatch, tokens: int = 1600, policy: PredictivePolicy = POLICY) -> Scores:
    return policy.score(request(tokens), view_, match_, random.Random(0))


def chosen(view_: FleetView, match_: PrefixMatch, tokens: int = 1600, policy: PredictivePolicy = POLICY) -> str:
    return decide(policy, request(tokens), view_, match_, random.Random(0)).replica_id


def two(**columns: list[float]) -> FleetView:
    return view(2, **columns)


def test_each_term_by_hand() -> None:
    seen = two(
        prefill_token_s=[0.001, 0.002],
        queued_token_s=[0.002, 0.003],
        prefill_pair_s=[1e-6, 0.0],
        queued_prefill_tokens=[1000.0, 0.0],
        running=[4.0, 0.0],
        decode_step_s=[0.05, 0.04],
        routed_share=[1.5, 0.5],
        assigned_share=[1.2, 0.8],
    )
    found = score(seen, match([50.0, 0.0], 100))
    # 50 of 100 blocks of 16 tokens are held: 800 tokens are computed, each of which looks at 800 + 400 on average.
    assert found.terms["prefill_s"].tolist() == pytest.approx([800 * 0.001 + 800 * 1200 * 1e-6, 1600 * 0.002])
    assert found.terms["queue_s"].tolist() == pytest.approx([2.0, 0.0])
    assert found.terms["decode_s"].tolist() == pytest.approx([0.05 * 1.5, 0.04])  # a step of its own, and half of one
    weight = 0.05 + 0.1 * 1.0  # the mean queue is one second
    assert found.terms["slowdown_s"].tolist() == pytest.approx([weight * 4 * 1.76, 0.0])
    assert found.terms["balance_s"].tolist() == pytest.approx([0.5 * 0.5 * 1600 * 0.0025, 0.0])
    assert found.cost.tolist() == pytest.approx([sum(term[row] for term in found.terms.values()) for row in (0, 1)])
    assert found.predicted_ttft_s is not None
    assert found.predicted_ttft_s[0] == pytest.approx(2.0 + 1.76 + found.terms["decode_s"][0])


def test_the_prefix_is_worth_what_it_saves_and_no_more() -> None:
    rates = {"prefill_token_s": [1e-3, 1e-3], "queued_token_s": [1e-3, 1e-3], **NO_PAIRS}
    assert chosen(two(queued_prefill_tokens=[700.0, 0.0], **rates), match([50.0, 0.0], 100)) == "r0"
    assert chosen(two(queued_prefill_tokens=[900.0, 0.0], **rates), match([50.0, 0.0], 100)) == "r1"


def test_a_slow_gpu_with_the_prefix_loses_against_a_fast_one_without() -> None:
    rates = {"prefill_token_s": [5e-3, 1e-3], "queued_token_s": [5e-3, 1e-3], **NO_PAIRS}
    assert chosen(two(**rates), match([50.0, 0.0], 100)) == "r1"
    assert chosen(two(**rates), match([90.0, 0.0], 100)) == "r0"


def test_a_prefix_that_everybody_asks_for_earns_nothing_but_is_predicted() -> None:
    rates = {"prefill_token_s": [1e-3, 1e-3], "queued_token_s": [1e-3, 1e-3], "decode_step_s": [0.0, 0.0], **NO_PAIRS}
    found = score(two(**rates), match([50.0, 0.0], 100, common=50))
    assert found.terms["prefill_s"][0] == found.terms["prefill_s"][1]
    assert found.predicted_ttft_s is not None
    assert found.predicted_ttft_s.tolist() == pytest.approx([0.8, 1.6])


@pytest.mark.parametrize(("tier", "saved"), [("gpu", 0.8), ("host", 0.68), ("disk", 0.4)])
def test_a_block_in_a_slower_tier_saves_less(tier: str, saved: float) -> None:
    rates = {"prefill_token_s": [1e-3, 1e-3], **NO_PAIRS}
    there = [50.0, 0.0]
    held = match(there, 100, host=there if tier == "host" else None, disk=there if tier == "disk" else None)
    prefill_s = score(two(**rates), held).terms["prefill_s"]
    assert prefill_s[1] - prefill_s[0] == pytest.approx(saved)


def test_who_was_not_heard_of_is_trusted_less_and_less() -> None:
    rates = {"prefill_token_s": [1e-3, 1e-3], **NO_PAIRS}
    saved = []
    for age_s in (0.5, 3.0, 10.0, 60.0):
        prefill_s = score(two(age_s=[age_s, 0.0], **rates), match([50.0, 0.0], 100)).terms["prefill_s"]
        saved.append(float(prefill_s[1] - prefill_s[0]))
    assert saved[0] == pytest.approx(0.8)
    assert saved == sorted(saved, reverse=True)
    assert saved[-1] < 0.01


def test_near_ties_go_to_who_had_least_and_say_so() -> None:
    rates = {"prefill_token_s": [1e-3, 1.001e-3], "queued_token_s": [1e-3, 1e-3], "assigned_share": [1.1, 0.9]}
    decision = decide(
        replace(POLICY, balance_weight=0.0),
        request(1600),
        two(**rates, **NO_PAIRS),
        match([0, 0], 100),
        random.Random(0),
    )
    assert (decision.replica_id, decision.rule) == ("r1", "near_tie")


def test_a_prompt_stays_with_who_holds_it_unless_another_is_clearly_better() -> None:
    rates = {"prefill_token_s": [1e-3, 1e-3], "queued_token_s": [1e-3, 1e-3], "assigned_share": [1.0, 0.2], **NO_PAIRS}
    alike = two(queued_prefill_tokens=[801.0, 0.0], **rates)
    decision = decide(
        replace(POLICY, balance_weight=0.0), request(1600), alike, match([50.0, 0.0], 100), random.Random(0)
    )
    assert (decision.replica_id, decision.rule) == ("r0", "kept_prefix")


def test_an_idle_replica_is_not_passed_over_for_ever_and_cheap_requests_go_there_first() -> None:
    rates = {"prefill_token_s": [1e-3, 1e-3], "queued_token_s": [1e-3, 1e-3], **NO_PAIRS}
    cheap, dear = match([10.0, 0.0], 100), match([99.0, 0.0], 100)

    def first(decisions: int, held: PrefixMatch, running: float = 0.0) -> tuple[str, str]:
        seen = replace(two(last_routed=[90.0, 90.0], running=[0.0, running], **rates), decisions=decisions)
        seen = replace(seen, last_routed=np.array([decisions - 1.0, 90.0]))
        decision = decide(POLICY, request(1600), seen, held, random.Random(0))
        return decision.replica_id, decision.rule

    assert [first(98, held)[0] for held in (cheap, dear)] == ["r0", "r0"]
    assert [first(100, held)[0] for held in (cheap, dear)] == ["r1", "r0"]
    assert first(107, dear) == ("r1", "unused")
    assert first(107, dear, running=1.0)[0] == "r0"


def test_a_replica_far_beyond_its_share_gets_nothing_while_another_can() -> None:
    rates = {"prefill_token_s": [1e-3, 1e-3], "queued_token_s": [1e-3, 1e-3], **NO_PAIRS}
    seen = two(lasting_share=[1.3, 0.7], queued_prefill_tokens=[0.0, 50_000.0], **rates)
    assert chosen(seen, match([99.0, 0.0], 100)) == "r1"
    assert chosen(replace(seen, lasting_share=np.array([1.0, 1.0])), match([99.0, 0.0], 100)) == "r0"


def test_a_deep_backlog_keeps_long_prompts_where_fewer_streams_run() -> None:
    rates = {"prefill_token_s": [1e-3, 1e-3], "queued_token_s": [1e-3, 1e-3], **NO_PAIRS}
    light = two(running=[40.0, 1.0], queued_prefill_tokens=[0.0, 300.0], **rates)
    heavy = two(running=[40.0, 1.0], queued_prefill_tokens=[30_000.0, 30_300.0], **rates)
    gain = [float(np.diff(score(seen, match([0.0, 0.0], 100)).terms["slowdown_s"])[0]) for seen in (light, heavy)]
    assert gain[1] < 10 * gain[0] < 0.0


columns = st.floats(0.0, 1e4, allow_nan=False)


@given(st.lists(st.tuples(columns, columns, st.floats(1e-5, 1e-2), st.integers(0, 100)), min_size=1, max_size=8))
def test_costs_are_finite_and_more_load_never_attracts(rows: list[tuple[float, float, float, int]]) -> None:
    queued, running, rate, hits = (list(column) for column in zip(*rows, strict=True))
    seen = view(len(rows), queued_prefill_tokens=queued, running=running, prefill_token_s=rate, queued_token_s=rate)
    found = score(seen, match([float(hit) for hit in hits], 100))
    assert np.isfinite(found.cost).all()
    more = replace(seen, queued_prefill_tokens=seen.queued_prefill_tokens + np.eye(1, len(rows))[0] * 5000.0)
    alone = replace(POLICY, backlog_weight=0.0)  # the backlog of one changes what the streams of all others are worth
    first = decide(alone, request(1600), seen, match([float(hit) for hit in hits], 100), random.Random(0))
    then = decide(alone, request(1600), more, match([float(hit) for hit in hits], 100), random.Random(0))
    if first.replica_id != "r0":
        assert then.replica_id != "r0" or then.rule == "near_tie"
