"""The arithmetic that is shown is that of the plan."""

from dataclasses import replace
from typing import Any

from builders.plan.choose import choose
from builders.plan.explain import explain
from tests.unit.builders.plan.requests import CHAT, offer, request


def shown(model: str, gpu: str = "h100", **goal: Any) -> dict[str, tuple[str, str]]:
    choice = choose(request(model, gpu, **goal))
    assert choice is not None
    return {
        what: (how, result) for section in explain(choice.request, choice.best) for what, how, result in section.lines
    }


def test_a_dense_model() -> None:
    lines = shown("llama-3.1-8b", rate_per_s=30, **CHAT)
    assert lines["attention, a layer"] == ("4096 x 128 x (2 x 32 + 2 x 8)", "41.9 M")
    assert lines["network, a layer"] == ("3 x 4096 x 14336", "176.2 M")
    assert lines["all weights"][1] == "8,030,261,248"
    assert lines["bytes of a token"] == ("32 layers x 8 x (128 + 128) x 2 (bf16)", "131,072")
    assert lines["- weights (32 layers)"][1] == "9.08 GB"
    assert lines["replicas"][0].startswith("30/s / ")
    assert lines["output"][1] == "6,000 tokens/s"
    assert "<= 200 ms" in lines["TTFT p95"][1]


def test_experts_and_latent_attention() -> None:
    lines = shown("deepseek-v3", "h200", rate_per_s=5, **{**CHAT, "ttft_ms": 2000.0})
    assert lines["attention, a layer"] == (
        "(7168 + 128 x 192) x 1536 + 7168 x (512 + 64) + 512 x 128 x (128 + 128) + 128 x 128 x 7168",
        "187.1 M",
    )
    assert lines["experts, a layer"][0] == "256 x 3 x 7168 x 2048"
    assert lines["weights that a token visits"] == ("8 of 256 experts", "37,552,297,472")
    assert "(512 + 64)" in lines["bytes of a token"][0]


def test_windows_and_cost() -> None:

    asked = replace(request("gemma-3-27b", rate_per_s=2), offers=(offer("h200", 3.0),))
    choice = choose(asked)
    assert choice is not None
    lines = {what: how for section in explain(asked, choice.best) for what, how, _ in section.lines}
    assert lines["windows"] == "52 of 62 layers keep the last 1024 tokens"
    assert lines["cost"] == "1 GPUs x $3"


def test_what_a_step_is_made_of_is_the_step() -> None:
    choice = choose(request("llama-3.1-8b", rate_per_s=30, **CHAT))
    assert choice is not None
    steps = next(section for section in explain(choice.request, choice.best) if section.title == "Steps")
    times = {what: float(result.removesuffix(" ms")) for what, _, result in steps.lines}
    parts = times["fixed and communication"] + times["reading keys and values"]
    parts += max(times["reading weights"], times["products of these tokens"])
    assert abs(parts - times["T0: a step without prompts"]) < 0.2
