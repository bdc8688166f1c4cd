"""Sizes of engines: what is asked for, what fits, and what cannot be."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders.compile.sizes import EngineSizes, Place, graph_batch_sizes, plan_sizes
from builders.settings.compile import CompileSettings
from builders.settings.tune import TuneSettings
from serve.engines.simulated.model_shape import ModelShape
from serve.engines.simulated.split import Precisions, Split
from serve.engines.trtllm.settings import TrtllmSettings
from serve.errors import ConfigError

LLAMA_8B = ModelShape(
    layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, intermediate=14336, vocab=128256, context_tokens=131072
)
H100 = 85_520_809_984
TUNE = TuneSettings(prompt_tokens=1024, output_tokens=256)


def sizes(
    memory: int | None = H100,
    precisions: Precisions | None = None,
    split: Split | None = None,
    compiled: dict[str, int] | None = None,
    **engine: object,
) -> EngineSizes:
    place = Place(LLAMA_8B, precisions or Precisions(), split or Split(), memory)
    return plan_sizes(
        place, CompileSettings.model_validate(compiled or {}), TrtllmSettings.model_validate(engine), TUNE
    )


def test_an_8b_model_on_an_h100() -> None:
    planned = sizes()
    # 80 GiB less 16 GB of weights leaves some 60 GB; a token takes 32 layers x 2 x 8 heads x 128 x 2 bytes = 128 KiB.
    assert planned.context_tokens == 131072
    assert planned.max_num_tokens == 8192
    assert planned.max_batch_size == 256  # 400,000 tokens hold 330 sequences of 1,280
    assert planned.max_input_tokens == planned.context_tokens
    assert planned.reasons.keys() == {"max_batch_size", "max_num_tokens", "max_input_tokens", "context_tokens"}


def test_fewer_bits_leave_room_for_more_sequences() -> None:
    eight = sizes(precisions=Precisions(weights="fp8", kv_cache="fp8"))
    assert eight.max_batch_size > sizes().max_batch_size


def test_a_small_gpu_holds_less_of_the_context() -> None:
    small = sizes(memory=24_000_000_000)
    assert small.context_tokens < 131072
    assert small.context_tokens % 32 == 0
    assert "KV cache holds" in small.reasons["context_tokens"]


def test_what_the_build_says_comes_before_what_the_engine_says() -> None:
    planned = sizes(compiled={"max_batch_size": 16}, max_batch_size=8, max_num_tokens=4096, context_tokens=2048)
    assert (planned.max_batch_size, planned.max_num_tokens, planned.context_tokens) == (16, 4096, 2048)
    assert planned.reasons["max_batch_size"] == "compile.max_batch_size says so"
    assert planned.reasons["max_num_tokens"] == "engine.max_num_tokens says so"


def test_without_a_gpu_nothing_is_promised() -> None:
    planned = sizes(memory=None)
    assert planned.max_batch_size == 64
    assert "no GPU was seen" in planned.reasons["max_batch_size"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"memory": 12_000_000_000}, r"weights of stage 0 take 16\.\d GB of each GPU, which has 12\.0 GB"),
        ({"compiled": {"context_tokens": 200_000}}, r"compile\.context_tokens: 200000 exceeds .* 131072"),
        ({"compiled": {"max_input_tokens": 4096, "context_tokens": 2048}}, r"compile\.max_input_tokens: 4096 exceeds"),
        ({"compiled": {"max_batch_size": 512, "max_num_tokens": 256}}, r"compile\.max_batch_size: 512 exceeds"),
    ],
)
def test_sizes_that_cannot_be(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        sizes(**arguments)  # type: ignore[arg-type]


def test_two_gpus_share_what_does_not_fit_one() -> None:
    assert sizes(memory=12_000_000_000, split=Split(tensor=2)).max_batch_size >= 1


@given(largest=st.integers(1, 2048))
def test_graphs_pad_no_batch_by_much_and_reach_the_largest(largest: int) -> None:
    recorded = graph_batch_sizes(largest)
    assert recorded == tuple(sorted(set(recorded)))
    assert recorded[0] == 1
    assert recorded[-1] == largest
    assert len(recorded) < 50
    assert all(b - a <= max(8, a // 8) for a, b in pairwise(recorded))
