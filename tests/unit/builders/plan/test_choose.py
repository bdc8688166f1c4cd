"""The chosen candidate is the best by the objective, meets the limits, and is no lossier than it has to be."""

from dataclasses import replace
from typing import Any

import pytest

from builders.plan.candidates import candidates
from builders.plan.choose import Choice, choose, output_tokens_per_s, request_s, tokens_per_gpu_hour
from builders.plan.evaluate import Obstacle, evaluate
from builders.plan.request import PlanRequest
from tests.unit.builders.plan.requests import CHAT, offer, request


def chosen(asked: PlanRequest) -> Choice:
    choice = choose(asked)
    assert choice is not None
    return choice


def test_every_candidate_that_is_offered_meets_the_goal() -> None:
    choice = chosen(request(rate_per_s=30, max_gpus=8, **CHAT))
    for evaluation in choice.ranked:
        state = evaluation.state
        assert state is not None
        assert state.ttft_s * 1e3 <= 200
        assert state.tpot_s * 1e3 <= 50
        assert state.rate_per_s * evaluation.replicas == pytest.approx(30, rel=1e-3)
        assert evaluation.gpus <= 8
        assert evaluation.gpus == evaluation.replicas * evaluation.candidate.split.world_size
        assert state.batch < evaluation.sizes.limits.sequences
    assert all(evaluation.obstacle is not None for evaluation in choice.refused)


def test_the_fewest_gpus_are_chosen_and_of_equals_the_least_lossy() -> None:
    choice = chosen(request(rate_per_s=30, **CHAT))
    assert choice.best.gpus == min(evaluation.gpus for evaluation in choice.ranked) == 1
    assert (choice.best.candidate.recipe, choice.best.candidate.kv_cache) == ("fp8", "auto")
    calm = chosen(request(rate_per_s=3, **CHAT)).best
    assert (calm.candidate.recipe, calm.gpus) == ("none", 1)


@pytest.mark.parametrize("headroom", [0.0, 0.1, 0.4])
def test_each_replica_keeps_some_of_what_it_can_carry_free(headroom: float) -> None:
    for evaluation in chosen(request(rate_per_s=200, headroom=headroom, **CHAT)).ranked:
        state, most = evaluation.state, evaluation.most
        assert state is not None
        assert most is not None
        allowed = most.rate_per_s * (1 - headroom)
        assert state.rate_per_s <= allowed * 1.000001
        if evaluation.replicas > 1:  # with one replica less it would not
            assert 200 / (evaluation.replicas - 1) > allowed * 0.999999


def test_more_requests_take_more_gpus() -> None:
    gpus = [chosen(request(rate_per_s=rate, **CHAT)).best.gpus for rate in (10, 100, 1000)]
    assert gpus == sorted(gpus)
    assert gpus[2] >= 8 * gpus[1] / 1.5 > gpus[0]


def test_the_lowest_cost_may_take_more_and_cheaper_gpus() -> None:
    asked = request(gpu="h100", rate_per_s=30, **{**CHAT, "ttft_ms": 1000.0})
    cheap = replace(asked, offers=(offer("h100", 6.0), offer("l40s", 0.5)))
    assert cheap.objective == "lowest_cost"
    best = chosen(cheap).best
    assert best.candidate.offer.key == "l40s"
    assert best.gpus > 1
    assert best.dollars_per_hour == 0.5 * best.gpus
    dear = replace(asked, offers=(offer("h100", 2.0), offer("l40s", 3.0)))
    assert chosen(dear).best.candidate.offer.key == "h100"


def test_the_lowest_latency_takes_gpus_for_it() -> None:
    choice = chosen(request("llama-3.3-70b", rate_per_s=1, objective="lowest_latency", max_gpus=8))
    assert choice.best.candidate.split.tensor == 8
    assert request_s(choice.best) <= 1.02 * min(request_s(evaluation) for evaluation in choice.ranked)


def test_most_tokens_of_a_gpu_fill_the_batch() -> None:
    choice = chosen(request(input_tokens=1000, output_tokens=1000))
    best = choice.best
    assert best.candidate.recipe == "fp8"
    assert best.state is not None
    assert best.state.batch == best.load.largest_batch
    most = max(tokens_per_gpu_hour(evaluation) for evaluation in choice.ranked)
    assert tokens_per_gpu_hour(best) >= most / 1.02
    assert output_tokens_per_s(best, choice.request) == pytest.approx(tokens_per_gpu_hour(best) / 3600, rel=1e-6)
    limited = chosen(request(input_tokens=1000, output_tokens=1000, tpot_ms=10)).best
    assert tokens_per_gpu_hour(limited) < tokens_per_gpu_hour(best)


def test_the_shown_are_the_best_of_each_gpu_and_quantization() -> None:
    choice = chosen(request(gpu="h100,h200", rate_per_s=10, **CHAT))
    shown = choice.shown(50)
    kinds = [(e.candidate.offer.key, e.candidate.recipe, e.candidate.kv_cache) for e in shown]
    assert len(set(kinds)) == len(kinds) == 10
    assert shown[0] is choice.best
    assert len(choice.shown(2)) == 2


@pytest.mark.parametrize(
    ("model", "gpu", "goal", "obstacle"),
    [
        ("llama-3.3-70b", "l4", {"max_gpus": 1}, Obstacle.WEIGHTS),
        ("llama-3.1-8b", "l4", {"max_gpus": 1, "input_tokens": 131000, "output_tokens": 72}, Obstacle.CONTEXT),
        ("llama-3.1-8b", "h100", {"ttft_ms": 1.0}, Obstacle.TTFT),
        ("llama-3.1-8b", "h100", {"tpot_ms": 0.1}, Obstacle.TPOT),
        ("llama-3.1-8b", "h100", {"rate_per_s": 500, "max_gpus": 1}, Obstacle.GPUS),
    ],
)
def test_what_cannot_be_done_has_an_obstacle(model: str, gpu: str, goal: dict[str, Any], obstacle: Obstacle) -> None:

    asked = request(model, gpu, recipes=("none",), **goal)
    assert {evaluate(asked, candidate).obstacle for candidate in candidates(asked)} == {obstacle}
