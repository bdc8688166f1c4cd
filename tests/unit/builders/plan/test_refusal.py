"""Refusals name every bound that is violated, and remedies that do help."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from builders.plan.choose import choose
from builders.plan.refusal import Refusal, refuse
from builders.plan.remedies import is_feasible
from builders.plan.request import PlanRequest
from tests.unit.builders.plan.requests import CHAT, request


def refused(asked: PlanRequest) -> Refusal:
    assert choose(asked) is None
    refusal = refuse(asked)
    assert refusal.reasons
    for remedy in refusal.remedies:
        assert is_feasible(remedy.request), remedy.text
    return refusal


def texts(refusal: Refusal) -> str:
    return "\n".join([*refusal.reasons, *(remedy.text for remedy in refusal.remedies)])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (request(**{**CHAT, "ttft_ms": 10}, rate_per_s=30, max_gpus=8), ["TTFT: at best", "accept a TTFT of"]),
        (request(**{**CHAT, "tpot_ms": 2}, rate_per_s=30, max_gpus=8), ["TPOT: at best", "accept a TPOT of"]),
        (
            request(**{**CHAT, "ttft_ms": 10, "tpot_ms": 2}, rate_per_s=30, max_gpus=8),
            ["TTFT: at best", "TPOT: at best", "accept a TTFT of", "and a TPOT of"],
        ),
        (
            request(**CHAT, rate_per_s=1000, max_gpus=8),
            ["requests/s within the limits take", "and there are 8", "use 2", "ask for"],
        ),
        (
            request("llama-3.1-405b", recipes=("none",), max_gpus=8),
            ["weights of 811.8 GB (101.5 GB each)", "use 16 GPUs", "--quantize fp8", "--gpu b200"],
        ),
        (
            request("llama-3.3-70b", "l4", recipes=("none",), tpot_ms=1, rate_per_s=5, max_gpus=2),
            ["weights of 141.1 GB", "accept a TPOT of", " and use ", "--gpus"],
        ),
        (
            request(gpu="l4", recipes=("none",), tpot_ms=1, rate_per_s=2000, input_tokens=4000, max_gpus=1),
            ["1 GPU cannot carry 2000 requests/s", "TPOT: at best", "for one request alone", " and ask for "],
        ),
        (request("llama-2-7b", input_tokens=8000), ["holds 4,096 tokens, and 8,256", "--input-tokens 3840"]),
        (
            request(gpu="l4", recipes=("none",), max_gpus=1, context_tokens=100_000),
            ["the longest sequence that fits", "of 100,000 tokens", "--context-tokens", "use 2 GPUs"],
        ),
        (
            request(gpu="a100-80gb", recipes=("fp8",)),
            ["none that is allowed can be computed on A100", "--quantize none"],
        ),
    ],
    ids=[
        "ttft",
        "tpot",
        "both",
        "gpus",
        "weights",
        "weights and tpot",
        "rate and tpot",
        "model's context",
        "context",
        "quantization",
    ],
)
def test_reasons_and_remedies(asked: PlanRequest, said: list[str]) -> None:
    found = texts(refused(asked))
    for words in said:
        assert words in found


def test_the_smallest_feasible_limit_is_named() -> None:
    asked = request(**{**CHAT, "tpot_ms": 2}, rate_per_s=30, max_gpus=8)
    remedy = next(remedy for remedy in refused(asked).remedies if "TPOT" in remedy.text)
    limit = remedy.request.goal.tpot_ms
    assert limit is not None
    closer = asked.goal.changed(tpot_ms=limit * 0.9)
    assert not is_feasible(PlanRequest(asked.model, closer, asked.offers))


def test_the_largest_feasible_rate_is_named() -> None:
    asked = request(**CHAT, rate_per_s=1000, max_gpus=2)
    remedy = next(remedy for remedy in refused(asked).remedies if "ask for" in remedy.text)
    rate = remedy.request.goal.rate_per_s
    assert rate is not None
    more = asked.goal.changed(rate_per_s=rate * 1.15)
    assert not is_feasible(PlanRequest(asked.model, more, asked.offers))


goals = st.fixed_dictionaries(
    {
        "ttft_ms": st.sampled_from([None, 5.0, 30.0, 500.0]),
        "tpot_ms": st.sampled_from([None, 1.0, 8.0, 40.0]),
        "rate_per_s": st.sampled_from([None, 1.0, 50.0, 2000.0]),
        "input_tokens": st.sampled_from([100, 4000]),
        "max_gpus": st.sampled_from([1, 2, 8]),
    }
)


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(["llama-3.1-8b", "llama-3.3-70b", "qwen3-30b-a3b"]), st.sampled_from(["l4", "h100"]), goals)
def test_every_remedy_makes_it_possible(model: str, gpu: str, goal: dict[str, Any]) -> None:
    asked = request(model, gpu, recipes=("none",), **goal)
    assume(not is_feasible(asked))
    refused(asked)


def test_what_is_kept_free_is_said_and_can_be_given_up() -> None:
    asked = request(recipes=("none",), rate_per_s=1, max_gpus=1)
    choice = choose(asked)
    assert choice is not None
    most = max(evaluation.most.rate_per_s for evaluation in choice.ranked if evaluation.most is not None)
    refusal = refused(replace(asked, goal=asked.goal.changed(rate_per_s=0.95 * most)))
    assert "1 GPU cannot carry" in texts(refusal)
    assert "with 10% of each replica kept free" in texts(refusal)
    assert "keep nothing of a replica free: --headroom 0" in texts(refusal)
