"""What requests become for TensorRT-LLM, and what is refused by name instead of being ignored."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.core.parallel import ParallelLayout
from serve.core.request import GenerateRequest, SamplingParams, pack_tokens
from serve.engines.trtllm.arguments import EnginePlan, plan_engine
from serve.engines.trtllm.line import Backend, Line
from serve.engines.trtllm.model_directory import BuiltEngine, DirectoryKind, ModelDirectory
from serve.engines.trtllm.orchestration import Orchestration
from serve.engines.trtllm.sampling import (
    MAX_LOGITS_BYTES,
    SamplingSupport,
    check_sampling,
    sampling_keywords,
    sampling_support,
)
from serve.engines.trtllm.settings import TrtllmSettings
from serve.errors import RequestError

FIELDS = frozenset({"prompt_ignore_length"})
ALL = SamplingSupport()
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


def plan(settings: TrtllmSettings, line: Line, model: ModelDirectory | None = None) -> EnginePlan:
    model = model or ModelDirectory(Path("/models/m"))
    return plan_engine(settings, ParallelLayout(), Orchestration(), model, line)


def support(line: Line, fields: frozenset[str] = FIELDS, **settings: Any) -> SamplingSupport:
    chosen = TrtllmSettings(**settings)
    return sampling_support(plan(chosen, line), chosen, fields)


def keywords(prompt_tokens: int = 7, **sampling: Any) -> dict[str, Any]:
    request = GenerateRequest("r", "m", pack_tokens([1] * prompt_tokens), SamplingParams(**sampling))
    return sampling_keywords(request, ALL, fresh_seed=99)


def test_trap_3_1_greedy_is_top_k_one_and_nothing_else() -> None:
    for greedy in ({"temperature": 0.0, "seed": 5, "top_p": 0.5, "min_p": 0.3}, {"top_k": 1}):
        found = keywords(**greedy)
        assert found["top_k"] == 1
        assert not found.keys() & {"temperature", "top_p", "min_p", "seed"}


def test_trap_3_1_the_seed_varies_and_is_never_the_runtimes_zero() -> None:
    assert keywords()["seed"] == 99
    assert keywords(seed=3)["seed"] == 3
    assert keywords(seed=-1)["seed"] == 2**64 - 1
    assert keywords(seed=0)["seed"] == 0


def test_a_draw_always_says_top_p_and_temperature() -> None:
    found = keywords(temperature=0.7, top_k=5, min_p=0.1)
    assert found | {"temperature": 0.7, "top_p": 1.0, "top_k": 5, "min_p": 0.1} == found
    assert "top_k" not in keywords()


def test_trap_7_3_16_max_tokens_zero_is_never_passed() -> None:
    assert keywords(max_tokens=0)["max_tokens"] == 1
    assert keywords(max_tokens=9)["max_tokens"] == 9


def test_trap_2_1_an_end_id_is_always_given() -> None:
    without = keywords()
    assert without["ignore_eos"] is True
    assert isinstance(without["end_id"], int)
    with_stops = keywords(stop_token_ids=(5, 6, 7))
    assert (with_stops["end_id"], with_stops["pad_id"], with_stops["stop_token_ids"]) == (5, 5, [6, 7])
    assert "ignore_eos" not in with_stops
    assert "stop_token_ids" not in keywords(stop_token_ids=(5,))


def test_min_tokens_need_a_stop_token_to_hold_back() -> None:
    assert keywords(min_tokens=3, stop_token_ids=(5,))["min_tokens"] == 3
    assert "min_tokens" not in keywords(min_tokens=3)


def test_penalties_leave_the_prompt_alone() -> None:
    found = keywords(prompt_tokens=11, presence_penalty=0.5, frequency_penalty=-0.5)
    assert found | {"presence_penalty": 0.5, "frequency_penalty": -0.5, "prompt_ignore_length": 11} == found
    assert "prompt_ignore_length" not in keywords(repetition_penalty=1.2)  # which is about the prompt, too
    assert not keywords().keys() & {*PENALTIES, "prompt_ignore_length"}


def test_logprobs_are_asked_for_by_at_least_one() -> None:
    assert keywords(logprobs=0)["logprobs"] == 1
    assert keywords(logprobs=4)["logprobs"] == 4
    assert "logprobs" not in keywords()


def test_prompt_logprobs_are_made_from_logits() -> None:
    found = keywords(prompt_logprobs=3)
    assert found["return_context_logits"] is True
    assert "prompt_logprobs" not in found


@given(
    params=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 1.0, 0.3]),
        top_p=st.sampled_from([1.0, 0.1]),
        top_k=st.integers(0, 3),
        min_p=st.sampled_from([0.0, 0.5]),
        seed=st.none() | st.integers(-(2**63), 2**64 - 1),
        repetition_penalty=st.sampled_from([1.0, 1.5]),
        presence_penalty=st.sampled_from([0.0, 1.0]),
        logit_bias=st.dictionaries(st.integers(0, 9), st.floats(-100, 100), max_size=2),
        max_tokens=st.integers(0, 3),
        min_tokens=st.integers(0, 1),
        stop_token_ids=st.lists(st.integers(0, 9), max_size=3, unique=True).map(tuple),
        logprobs=st.none() | st.integers(0, 3),
        prompt_logprobs=st.none() | st.integers(0, 3),
    )
)
def test_every_keyword_is_one_that_both_lines_have(params: SamplingParams) -> None:
    request = GenerateRequest("r", "m", pack_tokens([1]), params)
    found = sampling_keywords(request, ALL, 1)
    assert found.keys() <= KNOWN
    assert found["max_tokens"] >= 1
    stops = {*found.get("stop_token_ids", []), *([] if found.get("ignore_eos") else [found["end_id"]])}
    assert stops == set(params.stop_token_ids)


KNOWN = {
    *("max_tokens", "min_tokens", "end_id", "pad_id", "ignore_eos", "stop_token_ids", "seed", "temperature", "top_k"),
    *("top_p", "min_p", *PENALTIES, "prompt_ignore_length", "embedding_bias", "logprobs", "return_context_logits"),
    "detokenize",
}


@pytest.mark.parametrize(
    ("name", "value"),
    [("repetition_penalty", 1.1), ("presence_penalty", 0.1), ("frequency_penalty", 0.1), ("min_p", 0.1), ("seed", 0)],
)
def test_what_the_default_sampler_of_1_2_ignores_is_refused(name: str, value: float) -> None:
    sampling: dict[str, Any] = {name: value}
    params = SamplingParams(**sampling)
    for sampler in ("auto", "torch"):
        with pytest.raises(RequestError, match="sampler: trtllm") as raised:
            check_sampling(params, support(Line.V1_2, sampler=sampler), 5, 1000)
        assert raised.value.param == name
    check_sampling(params, support(Line.V1_2, sampler="trtllm"), 5, 1000)
    check_sampling(params, support(Line.V1_2, backend="tensorrt"), 5, 1000)
    check_sampling(params, support(Line.NEWEST), 5, 1000)


def test_penalties_that_would_count_the_prompt_are_refused() -> None:
    found = support(Line.NEWEST, fields=frozenset())
    for params in (SamplingParams(presence_penalty=0.1), SamplingParams(frequency_penalty=0.1)):
        with pytest.raises(RequestError, match="prompt"):
            check_sampling(params, found, 5, 1000)
    check_sampling(SamplingParams(repetition_penalty=1.1), found, 5, 1000)


def test_trap_5_1_a_tensorrt_engine_needs_kept_logits() -> None:
    params = (SamplingParams(logprobs=1), SamplingParams(prompt_logprobs=1))
    for param, name in zip(params, ("logprobs", "prompt_logprobs"), strict=True):
        with pytest.raises(RequestError, match=rf"build\.{name}") as raised:
            check_sampling(param, support(Line.V1_2, backend="tensorrt"), 5, 1000)
        assert raised.value.param == name
        check_sampling(param, support(Line.V1_2, backend="tensorrt", build={name: True}), 5, 1000)
        check_sampling(param, support(Line.V1_2), 5, 1000)


def test_a_built_engine_without_logits_says_so() -> None:
    built = BuiltEngine("1.2.1", 1, 1, 1, 8, 64, 128, 32)
    model = ModelDirectory(Path("/models/e"), DirectoryKind.ENGINE, None, built)
    settings = TrtllmSettings()
    chosen = plan(settings, Line.V1_2, model)
    assert chosen.backend is Backend.TENSORRT
    assert sampling_support(chosen, settings, FIELDS).missing.keys() == {"logprobs", "prompt_logprobs"}
    keeping = replace(built, gather_context_logits=True, gather_generation_logits=True)
    chosen = plan(settings, Line.V1_2, replace(model, built=keeping))
    assert sampling_support(chosen, settings, FIELDS).missing == {}


def test_min_tokens_with_several_stop_tokens_is_refused() -> None:
    with pytest.raises(RequestError, match="min_tokens") as raised:
        check_sampling(SamplingParams(min_tokens=1, stop_token_ids=(1, 2)), ALL, 5, 1000)
    assert raised.value.param == "min_tokens"
    check_sampling(SamplingParams(min_tokens=1, stop_token_ids=(1,)), ALL, 5, 1000)
    check_sampling(SamplingParams(stop_token_ids=(1, 2)), ALL, 5, 1000)


def test_logits_of_a_long_prompt_are_refused() -> None:
    most = MAX_LOGITS_BYTES // 4000
    check_sampling(SamplingParams(prompt_logprobs=0), ALL, most, 1000)
    with pytest.raises(RequestError, match=str(most)):
        check_sampling(SamplingParams(prompt_logprobs=0), ALL, most + 1, 1000)
    check_sampling(SamplingParams(), ALL, most + 1, 1000)
