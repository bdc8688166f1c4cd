"""What ranks hold of weights, keys and values: nothing is lost, and only what cannot be cut is held twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.engines.simulated.known_models import MODELS
from serve.engines.simulated.model_shape import LatentAttention, ModelShape
from serve.engines.simulated.split import Precisions, Split

GB = 1e9
precisions = st.sampled_from(["bf16", "fp8", "int8", "int4", "fp4", "mxfp4"])


def ranks_bytes(shape: ModelShape, split: Split, precision: Precisions) -> float:
    return split.tensor * sum(split.weight_bytes(shape, precision, s).total for s in range(split.pipeline))


def test_llama_70b_on_eight_gpus_by_hand() -> None:
    shape, split = MODELS["llama-3.3-70b"], Split(tensor=8)
    held = split.weight_bytes(shape, Precisions(weights="fp8"))
    attention = 8192 * 128 * (64 + 64 + 8 + 8)  # queries, output, keys, values
    assert held.attention == 80 * attention / 8
    assert held.dense == 80 * 3 * 8192 * 28672 / 8
    assert held.embedding == held.head == 2 * 8192 * 128256 / 8
    assert held.vectors == 2 * (80 * 2 + 1) * 8192
    assert held.total / GB == pytest.approx(9.0844, abs=0.0001)
    assert split.kv_bytes_per_token(shape, "bf16") == 80 * 2 * 128 * 2  # one key-value head each


def test_more_ranks_than_key_value_heads_hold_copies() -> None:
    shape = MODELS["llama-3.3-70b"]
    eight, sixteen = Split(tensor=8), Split(tensor=16)
    assert sixteen.kv_bytes_per_token(shape, "fp8") == eight.kv_bytes_per_token(shape, "fp8")
    assert (eight.kv_copies(shape), sixteen.kv_copies(shape)) == (1.0, 2.0)
    keys = 80 * 8192 * 128 * 2
    assert sixteen.weight_bytes(shape, Precisions(weights="fp8")).attention == 80 * 8192 * 128 * 128 / 16 + keys


def test_latent_attention_is_copied_unless_each_rank_has_its_own_sequences() -> None:
    shape = MODELS["deepseek-v3"]
    cut, own = Split(tensor=8, expert=8), Split(tensor=8, expert=8, attention_dp=True)
    assert cut.kv_copies(shape) == 8.0
    assert cut.kv_bytes_per_token(shape, "fp8") == own.kv_bytes_per_token(shape, "fp8") == 61 * 576
    assert own.weight_bytes(shape, Precisions(weights="fp8")).attention == 61 * shape.attention_weights
    down = 7168 * (1536 + 512 + 64)
    each = down + (shape.attention_weights - down) / 8
    assert cut.weight_bytes(shape, Precisions(weights="fp8")).attention == 61 * each


def test_experts_are_on_the_stages_of_their_layers() -> None:
    shape, split = MODELS["deepseek-v3"], Split(tensor=8, pipeline=2)
    first, second = (split.weight_bytes(shape, Precisions(weights="fp8"), stage) for stage in (0, 1))
    expert_layer = 256 * shape.expert_weights / 8
    assert (first.experts, second.experts) == (28 * expert_layer, 30 * expert_layer)  # of 31 and 30 layers
    assert (first.dense, second.dense) == (3 * shape.dense_weights / 8, 0.0)
    assert (first.head, second.embedding) == (0.0, 0.0)
    every_other = MODELS["llama-4-maverick"]
    halves = [Split(pipeline=2).weight_bytes(every_other, Precisions(), stage).experts for stage in (0, 1)]
    assert halves[0] == halves[1] > 0


def test_stages_keep_the_windows_of_their_layers() -> None:
    shape, split = MODELS["gemma-3-27b"], Split(pipeline=2)
    whole = Split().kv_bytes(shape, "fp8", 50_000)
    assert sum(split.kv_bytes(shape, "fp8", 50_000, stage) for stage in (0, 1)) == pytest.approx(whole)
    assert whole == shape.kv_bytes(50_000, "fp8")


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    layers, heads = draw(st.integers(1, 40)), 2 ** draw(st.integers(0, 6))
    experts = draw(st.sampled_from([0, 8, 64]))
    latent = LatentAttention(kv_rank=512, rope_dim=32, query_rank=draw(st.sampled_from([None, 768])))
    return ModelShape(
        layers=layers,
        hidden=draw(st.sampled_from([512, 4096])),
        heads=heads,
        kv_heads=min(heads, 2 ** draw(st.integers(0, 4))),
        head_dim=draw(st.sampled_from([64, 128])),
        latent=latent if draw(st.booleans()) else None,
        intermediate=1024,
        experts=experts,
        experts_per_token=min(experts, 4),
        shared_intermediate=draw(st.sampled_from([0, 512])),
        dense_layers=draw(st.integers(0, layers)),
        dense_layers_first=draw(st.booleans()),
        vocab=32000,
        tied_embeddings=draw(st.booleans()),
        vector_weights=draw(st.integers(0, 100_000)),
    )


splits = st.builds(
    Split,
    tensor=st.sampled_from([1, 2, 4, 8]),
    pipeline=st.integers(1, 5),
    attention_dp=st.booleans(),
)


@given(shapes(), st.integers(1, 8), precisions)
def test_stages_together_hold_every_weight_once(shape: ModelShape, pipeline: int, precision: str) -> None:
    held = ranks_bytes(shape, Split(pipeline=pipeline), Precisions(weights=precision))  # type: ignore[arg-type]
    whole = ranks_bytes(shape, Split(), Precisions(weights=precision))  # type: ignore[arg-type]
    copy = 2 * shape.head_weights if shape.tied_embeddings and pipeline > 1 else 0
    assert held == pytest.approx(whole + copy)
    if precision == "bf16":
        assert whole == pytest.approx(2 * shape.parameters)


@given(shapes(), splits, precisions)
def test_ranks_together_hold_every_weight_and_no_rank_holds_more_than_one_would(
    shape: ModelShape, split: Split, precision: str
) -> None:
    given_precisions = Precisions(weights=precision)  # type: ignore[arg-type]
    whole = Split().weight_bytes(shape, given_precisions).total
    assert ranks_bytes(shape, split, given_precisions) >= whole * (1 - 1e-9)
    for stage in range(split.pipeline):
        assert split.weight_bytes(shape, given_precisions, stage).total <= whole * (1 + 1e-9)


@given(shapes(), splits)
def test_a_smaller_precision_is_never_more_bytes(shape: ModelShape, split: Split) -> None:
    ordered = ["bf16", "fp8", "fp4", "mxfp4", "int4"]
    sizes = [split.weight_bytes(shape, Precisions(weights=p)).total for p in ordered]  # type: ignore[arg-type]
    assert sizes == sorted(sizes, reverse=True)
    assert split.kv_bytes(shape, "fp8", 1000) == split.kv_bytes(shape, "bf16", 1000) / 2


@given(shapes(), splits)
def test_more_tensor_ranks_never_hold_more_each(shape: ModelShape, split: Split) -> None:
    wider = split.model_copy(update={"tensor": 2 * split.tensor})
    for stage in range(split.pipeline):
        assert (
            wider.weight_bytes(shape, Precisions(), stage).total <= split.weight_bytes(shape, Precisions(), stage).total
        )
        assert wider.kv_bytes(shape, "bf16", 5000, stage) <= split.kv_bytes(shape, "bf16", 5000, stage)
