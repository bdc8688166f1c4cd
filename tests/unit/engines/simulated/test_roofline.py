"""Step times of layouts, experts, windows and latent attention."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.engines.simulated.hardware import GPUS, gpu_named
from serve.engines.simulated.known_models import MODELS
from serve.engines.simulated.latency import StepShape
from serve.engines.simulated.roofline import EFFICIENCIES, Efficiency, RooflineLatency, kv_capacity_tokens
from serve.engines.simulated.split import Precisions, Split

FREE = Efficiency(  # of everything but products and reading
    step_overhead_s=0, sequence_overhead_s=0, all_reduce_s=0, stage_loss=0, experts=1, compute=1, attention=1, memory=1,
    link=1,
)  # fmt: skip


def latency(
    model: str = "llama-3.3-70b", gpu: str = "h200", efficiency: Efficiency = FREE, kv: Any = "fp8", **split: Any
) -> RooflineLatency:
    precisions = Precisions(weights="fp8", kv_cache=kv)
    return RooflineLatency(MODELS[model], GPUS[gpu], Split(**split), precisions, efficiency)


def decode(sequences: int, context: int = 1000) -> StepShape:
    return StepShape(decode_sequences=sequences, decode_context_tokens=sequences * context)


def test_one_sequence_reads_all_weights_and_its_keys_and_values() -> None:
    shape, seconds = MODELS["llama-3.3-70b"], latency().step_s(decode(1))
    read = shape.weights + 2 * shape.head_weights + 1000 * shape.kv_bytes_per_token("fp8")
    assert seconds == pytest.approx(read / 4.8e12)


def test_many_tokens_are_computed() -> None:
    shape = MODELS["llama-3.3-70b"]
    seconds = latency().step_s(StepShape(8192, 0.0, 1))
    assert seconds == pytest.approx(2 * 8192 * shape.weights / 1.979e15 + 2 * shape.head_weights / 4.8e12)


def test_stages_share_the_work_of_many_but_each_group_reads_the_weights() -> None:
    one, four = latency(), latency(pipeline=4)
    few, many = decode(1), StepShape(8192, 0.0, 0)
    assert four.step_s(few) == pytest.approx(one.step_s(few), rel=0.1)
    assert four.step_s(many) == pytest.approx(one.step_s(many) / 4, rel=0.1)
    lost = latency(pipeline=4, efficiency=FREE.model_copy(update={"stage_loss": 0.1}))
    assert lost.step_s(many) == pytest.approx(1.3 * four.step_s(many))


def test_stages_across_nodes_talk_slower() -> None:
    here, there = latency(tensor=4, pipeline=2), latency(tensor=8, pipeline=2)
    prompts = StepShape(8192, 0.0, 0)
    work = latency(tensor=8).step_s(prompts) / 2
    assert there.step_s(prompts) - work > here.step_s(prompts) - latency(tensor=4).step_s(prompts) / 2


def test_copies_of_keys_and_values_are_read_by_every_rank() -> None:
    def kv_s(model: str, **split: Any) -> float:
        engine = latency(model, **split)
        return engine.step_s(decode(1, 100_000)) - engine.step_s(decode(1, 0))

    assert kv_s("llama-3.3-70b", tensor=8) == pytest.approx(kv_s("llama-3.3-70b") / 8)
    assert kv_s("llama-3.3-70b", tensor=16) == pytest.approx(kv_s("llama-3.3-70b", tensor=8))
    # Latent attention is bound by its products, which are cut; with data parallelism its reading is, too.
    assert kv_s("deepseek-v3", tensor=8, attention_dp=True) <= kv_s("deepseek-v3", tensor=8)


def test_attention_of_own_sequences_reads_all_of_attention() -> None:
    shape = MODELS["deepseek-v3"]
    cut, own = latency("deepseek-v3", tensor=8), latency("deepseek-v3", tensor=8, attention_dp=True)
    more = own.step_s(decode(8)) - cut.step_s(decode(8))
    attention = 61 * shape.attention_weights * 7 / 8 / 4.8e12
    head = 2 * shape.head_weights * 7 / 8 / 4.8e12
    assert more == pytest.approx(attention + head, rel=0.05)


def test_ranks_with_whole_experts_wait_for_the_fullest() -> None:
    cut, apart = latency("qwen3-235b-a22b", tensor=8), latency("qwen3-235b-a22b", tensor=8, expert=8)
    few, many = decode(4), decode(4096)
    assert apart.step_s(few) > 1.3 * cut.step_s(few)
    assert apart.step_s(many) < 1.1 * cut.step_s(many)


def test_windows_bound_what_is_read_and_computed() -> None:
    gemma = latency("gemma-3-27b")
    near, far = gemma.step_s(decode(8, 1024)), gemma.step_s(decode(8, 101_024))
    full = 10 * 2 * 16 * 128 * 8 * 100_000 / 4.8e12
    assert far - near == pytest.approx(full, rel=0.01)
    prompt = 32_768
    triangle = prompt * (prompt + 1) / 2
    slow = gemma.step_s(StepShape(prompt, triangle, 0)) - gemma.step_s(StepShape(prompt, 0.0, 0))
    pairs = 10 * triangle + 52 * prompt * 1024
    assert slow == pytest.approx(pairs * 4 * 32 * 128 / 0.9895e15, rel=0.01)


def test_the_parts_of_a_step_make_it_up() -> None:
    for model in ("llama-3.1-8b", "mixtral-8x7b", "gemma-3-27b", "deepseek-v3"):
        engine = latency(model, tensor=8, efficiency=EFFICIENCIES["hopper"])
        parts = engine.parts(64.0, 1000.0)
        whole = parts.keys_s + parts.fixed_s + max(parts.weights_s, parts.products_s)
        assert whole == pytest.approx(engine.step_s(decode(64)), rel=0.05)


@given(st.sampled_from(["llama-3.1-8b", "qwen3-30b-a3b", "deepseek-v2-lite", "gpt-oss-20b"]), st.integers(1, 512))
def test_more_sequences_and_longer_ones_never_take_less(model: str, sequences: int) -> None:
    engine = latency(model, efficiency=EFFICIENCIES["hopper"], tensor=2, expert=2)
    assert engine.step_s(decode(sequences + 1)) >= engine.step_s(decode(sequences))
    assert engine.step_s(decode(sequences, 2000)) >= engine.step_s(decode(sequences, 1000))


def test_the_cache_of_ranks_with_their_own_sequences_adds_up() -> None:
    def capacity(**split: Any) -> int:
        precisions = Precisions(weights="fp8", kv_cache="fp8")
        return kv_capacity_tokens(MODELS["deepseek-v3"], GPUS["h200"], Split(**split), precisions, 0.9, 4.0)

    assert capacity(tensor=8, attention_dp=True) > 5 * capacity(tensor=8)
    assert capacity(tensor=8, pipeline=2) > capacity(tensor=8)
    assert capacity() == 0


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("h100", "h100"),
        ("H100", "h100"),
        ("A100", "a100-80gb"),
        ("A100-80G", "a100-80gb"),
        ("A100-40G", "a100-40gb"),
        ("RTX-PRO-6000", "rtx-pro-6000"),
        ("GeForce-RTX-4090", "rtx-4090"),
        ("l40s", "l40s"),
        ("L4", "l4"),
        ("", None),
        ("MI300X", None),
    ],
)
def test_gpus_are_found_by_our_names_and_by_rays(name: str, key: str | None) -> None:
    assert gpu_named(name) == key
