"""Memory of a GPU: cases computed by hand, and laws."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders.plan.goal import Goal
from builders.plan.memory import MemoryPlan, activation_bytes, longest_sequence, plan_memory
from serve.engines.simulated.known_models import MODELS
from serve.engines.simulated.split import Split
from tests.unit.builders.plan.requests import candidate

GOAL = Goal(input_tokens=1000, output_tokens=200)


def memory(model: str = "llama-3.1-8b", batch: int = 256, tokens: int = 8192, **of: Any) -> MemoryPlan:
    return plan_memory(MODELS[model], candidate(**of), GOAL, max_batch_size=batch, max_num_tokens=tokens)


def test_llama_8b_in_fp8_on_an_h100_by_hand() -> None:
    plan = memory()
    layers = 32 * (4096 * 128 * 80 + 3 * 4096 * 14336)  # one byte each
    rest = 2 * (2 * 128256 * 4096 + (2 * 32 + 1) * 4096)  # embeddings, head, norms: two bytes each
    assert plan.weights.total == layers + rest
    assert plan.total == 81559 * 2**20
    assert plan.activations == 8192 * 2 * (4 * 4096 + 32 * 256 + 2 * 8 * 128 + 3 * 14336)
    assert plan.logits == 256 * 128256 * 6
    assert plan.free == plan.total - plan.weights.total - plan.activations - plan.logits - 1.8e9
    assert plan.kv_cache == 0.9 * plan.free
    assert plan.kv_bytes_per_token == 32 * 8 * 256 * 2
    assert plan.kv_tokens == int(plan.kv_cache / 131072)
    assert plan.kv_bytes_per_sequence == 38 * 32 * 131072  # 1,200 tokens in blocks of 32
    assert plan.sequences == int(plan.kv_cache / plan.kv_bytes_per_sequence)
    assert longest_sequence(MODELS["llama-3.1-8b"], candidate(), plan) == 131072


def test_llama_70b_in_16_bits_does_not_fit_one_h100_and_fits_two_barely() -> None:
    assert memory("llama-3.3-70b", weights="bf16").kv_cache < -50e9
    two = memory("llama-3.3-70b", weights="bf16", batch=16, tokens=2048, tensor=2)
    assert two.weights.total == pytest.approx(141.1e9 / 2, rel=0.001)
    assert 0 < two.kv_cache < 13e9


def test_latent_attention_is_small_and_attention_dp_multiplies_it() -> None:
    cut = memory("deepseek-v3", gpu="h200", tensor=8, expert=8, batch=64, tokens=2048)
    own = memory("deepseek-v3", gpu="h200", tensor=8, expert=8, attention_dp=True, batch=64, tokens=2048)
    assert cut.kv_bytes_per_token == own.kv_bytes_per_token == 61 * 576 * 2
    assert own.kv_tokens > 6 * cut.kv_tokens
    assert own.weights.attention > 4 * cut.weights.attention


def test_the_fullest_stage_decides() -> None:
    plan = memory("llama-3.3-70b", tensor=4, pipeline=2)
    assert plan.stage == 1  # logits and head are on the last one
    assert plan.weights.embedding == 0.0


def test_windows_bound_the_cache_of_long_sequences() -> None:
    long = Goal(input_tokens=100_000, output_tokens=1000)
    plan = plan_memory(MODELS["gemma-3-27b"], candidate(), long, max_batch_size=8, max_num_tokens=8192)
    whole = MODELS["gemma-3-27b"].kv_bytes_per_token("bf16") * long.sequence_tokens
    assert plan.kv_bytes_per_sequence < whole / 5
    chunks = plan_memory(MODELS["llama-4-scout"], candidate(tensor=8), long, max_batch_size=8, max_num_tokens=8192)
    each = MODELS["llama-4-scout"].kv_bytes_per_token("bf16") / 8
    assert chunks.kv_bytes_per_sequence >= each * long.sequence_tokens  # chunks do not slide: all is kept


def test_the_longest_sequence_is_what_fits() -> None:
    plan = memory("llama-3.1-8b", gpu="l4", batch=8, tokens=2048)
    longest = longest_sequence(MODELS["llama-3.1-8b"], candidate(gpu="l4"), plan)
    assert longest < 131072
    assert longest * plan.kv_bytes_per_token <= plan.kv_cache < (longest + 32) * plan.kv_bytes_per_token


def test_experts_need_room_for_every_copy_of_a_token() -> None:
    moe, tokens = MODELS["mixtral-8x7b"], 4096
    wide = 2 * (2 * 4096 + 3 * 14336)
    assert activation_bytes(moe, Split(), tokens) == tokens * 2 * (4 * 4096 + 32 * 256 + 2 * 8 * 128 + wide)


models = st.sampled_from(["llama-3.1-8b", "llama-3.3-70b", "qwen3-30b-a3b", "deepseek-v2-lite", "gemma-3-12b"])
tensors = st.sampled_from([1, 2, 4])
sizes = st.sampled_from([16, 256, 2048])


@given(models, tensors, st.sampled_from([1, 2, 4]), sizes)
def test_more_gpus_never_leave_less_room(model: str, tensor: int, pipeline: int, batch: int) -> None:
    def room(**split: Any) -> tuple[float, int]:
        plan = memory(model, batch=batch, **split)
        return plan.kv_cache / plan.kv_bytes_per_token, longest_sequence(MODELS[model], candidate(**split), plan)

    # The second rank brings NCCL's buffers, the price of not being alone.
    fixed = 0.8e9 / memory(model, tensor=tensor, pipeline=pipeline).kv_bytes_per_token
    here = room(tensor=tensor, pipeline=pipeline)
    for more in (room(tensor=2 * tensor, pipeline=pipeline), room(tensor=tensor, pipeline=2 * pipeline)):
        assert more[0] >= here[0] - fixed
    if tensor * pipeline > 1:
        assert room(tensor=2 * tensor, pipeline=pipeline)[1] >= here[1]


@given(models, tensors, sizes)
def test_smaller_precisions_never_leave_less_room(model: str, tensor: int, batch: int) -> None:
    ladder: list[Any] = ["bf16", "fp8", "fp4", "int4"]
    weights = [memory(model, batch=batch, tensor=tensor, weights=precision).kv_cache for precision in ladder]
    assert weights == sorted(weights)
    tokens = [memory(model, batch=batch, tensor=tensor, kv_cache=p).kv_tokens for p in ("bf16", "fp8", "fp4")]
    assert tokens == sorted(tokens)
