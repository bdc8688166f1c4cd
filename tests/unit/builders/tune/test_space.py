"""Knobs: what is searched, where it begins, and the settings that a point stands for."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders.tune.space import KnobSpace, Search, graph_sizes, make_space
from serve.engines.simulated.settings import SimulatedSettings
from serve.engines.transformers.settings import TransformersSettings
from serve.engines.trtllm.model_directory import BuiltEngine
from serve.engines.trtllm.settings import TrtllmSettings

BUILT = BuiltEngine("1.2.1", 1, 1, 1, 96, 6000, 4096, 32)


def transformers(
    section: dict[str, Any], fixed: dict[str, Any], search: Search = "full", *, on_gpu: bool = False
) -> KnobSpace:
    settings = TransformersSettings.model_validate(section)
    return make_space(settings, section, fixed, search=search, on_gpu=on_gpu)


def trtllm(
    section: dict[str, Any], fixed: dict[str, Any], search: Search = "full", built: BuiltEngine | None = None
) -> KnobSpace:
    settings = TrtllmSettings.model_validate(section)
    return make_space(settings, section, fixed, search=search, on_gpu=True, built=built)


def names(space: KnobSpace) -> list[str]:
    return [knob.name for knob in space.knobs]


def start(space: KnobSpace) -> dict[str, Any]:
    return space.named(tuple(knob.start for knob in space.knobs))


def test_search_begins_conservatively() -> None:
    assert start(transformers({}, {})) == {
        "max_batch_size": 16, "max_num_tokens": 256, "kv_cache_tokens": 16384
    }  # fmt: skip
    assert start(trtllm({}, {})) == {
        "max_batch_size": 64,
        "max_num_tokens": 4096,
        "kv_cache.memory_fraction": 0.8,
        "cuda_graphs": "dense",
    }


def test_search_begins_at_what_an_earlier_step_suggests() -> None:
    section = {"max_batch_size": 48, "kv_cache": {"memory_fraction": 0.88}}
    found = start(trtllm(section, {}))
    assert (found["max_batch_size"], found["kv_cache.memory_fraction"]) == (48, 0.88)


def test_what_the_specification_names_stays_as_it_is() -> None:
    fixed = {"max_batch_size": 8, "kv_cache": {"memory_fraction": 0.5}}
    space = trtllm(fixed, fixed)
    assert names(space) == ["max_num_tokens"]  # graphs follow from the batch
    assert space.settings((0,))["kv_cache"] == {"memory_fraction": 0.5}
    for key in ("kv_cache_tokens", "kv_cache_bytes", "kv_cache_fraction"):
        value = 0.5 if key == "kv_cache_fraction" else 4096
        assert names(transformers({key: value}, {key: value})) == ["max_batch_size", "max_num_tokens"]


def test_quick_search_has_fewer_knobs_and_off_has_none() -> None:
    assert names(transformers({}, {}, "quick")) == ["max_batch_size", "max_num_tokens"]
    space = trtllm({}, {}, "quick")
    assert [len(knob.values) for knob in space.knobs if knob.name == "cuda_graphs"] == [1]
    assert transformers({"device": "cpu"}, {}, "off") == KnobSpace((), {"device": "cpu"})
    assert make_space(SimulatedSettings(), {}, {}, search="full", on_gpu=False).knobs == ()


def test_gpu_has_a_share_of_its_memory_to_search() -> None:
    assert "kv_cache_fraction" in names(transformers({}, {}, on_gpu=True))


def test_compiled_engine_is_not_exceeded_and_has_no_graphs() -> None:
    section = {"backend": "tensorrt"}
    space = trtllm(section, {}, built=BUILT)
    assert {knob.name: knob.values[-1] for knob in space.knobs if knob.name.startswith("max")} == {
        "max_batch_size": 96,
        "max_num_tokens": 6000,
    }
    assert "cuda_graphs" not in names(space)


@given(st.data())
def test_values_of_a_knob_are_in_order_of_the_memory_they_take(data: st.DataObject) -> None:
    space = data.draw(st.sampled_from([transformers({}, {}), transformers({}, {}, on_gpu=True), trtllm({}, {})]))
    for knob in space.knobs:
        if knob.name == "cuda_graphs":
            sets = [set(graph_sizes(which, 64)) for which in knob.values]
            assert all(smaller <= larger for smaller, larger in pairwise(sets))
        else:
            assert list(knob.values) == sorted(set(knob.values))


def test_every_point_that_is_valid_makes_settings_and_graphs_follow_the_batch() -> None:
    space = trtllm({"cuda_graphs": {"padding": False, "max_batch_size": 512}, "max_batch_size": 512}, {})

    def is_valid(section: dict[str, Any]) -> bool:
        return bool(TrtllmSettings.model_validate(section))

    search = space.to_search(is_valid)
    assert search.batch == 0
    for rung in range(search.rungs[0]):
        point = (rung, *search.start[1:])
        section = space.settings(point)
        assert section["cuda_graphs"]["padding"] is False
        assert max(section["cuda_graphs"]["batch_sizes"]) == section["max_batch_size"]
        assert search.is_valid(point)


@given(st.integers(1, 2048), st.sampled_from(["quarter", "half", "all", "dense"]))
def test_graphs_reach_their_share_of_the_batch(batch: int, which: str) -> None:
    sizes = graph_sizes(which, batch)
    assert sizes == tuple(sorted(set(sizes)))
    assert sizes[0] == 1
    assert sizes[-1] == max(1, {"quarter": batch // 4, "half": batch // 2}.get(which, batch))
    assert len(sizes) <= 30


@pytest.mark.parametrize("batch", [16, 64])
def test_dense_graphs_have_every_eighth_size(batch: int) -> None:
    assert set(range(8, batch + 1, 8)) <= set(graph_sizes("dense", batch))
