"""The steps of a build: what each fingerprint covers, and what is still to be done."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders.context import StepName
from builders.graph import BuildFacts, BuildGraph, StepState, make_graph
from builders.spec import BuildSpec, parse_spec
from builders.step_table import files_of, visible_spec
from serve.artifacts.node_facts import GpuFacts, NodeFacts

H100 = GpuFacts(name="NVIDIA H100 80GB HBM3", compute_capability="9.0", memory_bytes=85_520_809_984)
LIBRARIES = {"torch": "2.9.0", "transformers": "4.57.3", "tensorrt_llm": "1.2.1", "nvidia-modelopt": "0.47.0"}
NODE = NodeFacts(gpus=(H100,) * 8, driver="580.1", cuda="13.0", machine="x86_64", libraries=LIBRARIES)
FACTS = BuildFacts(
    source="a" * 64,
    node=NODE,
    engine_node=NODE,
    code=dict.fromkeys(StepName, 1),
    user_files={"mine.jsonl": "1" * 64, "yours.jsonl": "2" * 64, "same.jsonl": "1" * 64},
)
F, R, Q, C, T, V, P = StepName
EVERY = {F, R, Q, C, T, V, P}


def spec(**changes: Any) -> BuildSpec:
    """A TensorRT engine, and so a build with every step."""
    base = {
        "name": "llama",
        "kind": "tensorrt-engine",
        "quantize": {"recipe": "fp8", "calibration": {"file": "mine.jsonl"}},
        "target": {"accelerator": "H100"},
    }
    return parse_spec(base | changes)


def fingerprints(build: BuildSpec, facts: BuildFacts = FACTS) -> dict[StepName, str]:
    return {step.name: step.fingerprint for step in make_graph(build, facts).steps}


def changed(build: BuildSpec, facts: BuildFacts = FACTS) -> set[StepName]:
    """The steps whose fingerprint is another one than that of `spec()`."""
    before, after = fingerprints(spec()), fingerprints(build, facts)
    return {step for step in EVERY if before[step] != after[step]}


@pytest.mark.parametrize(
    ("kind", "recipe", "steps"),
    [
        ("transformers-checkpoint", "none", [F, R, T, V, P]),
        ("transformers-checkpoint", "int8_weight_only", [F, R, Q, T, V, P]),
        ("trtllm-checkpoint", "fp8", [F, R, Q, C, T, V, P]),
        ("tensorrt-engine", "none", [F, R, C, T, V, P]),
    ],
)
def test_a_kind_of_bundle_has_its_steps(kind: str, recipe: str, steps: list[StepName]) -> None:
    graph = make_graph(parse_spec({"name": "m", "kind": kind, "quantize": recipe}), FACTS)
    assert [step.name for step in graph.steps] == steps


def test_a_step_comes_after_all_that_it_needs() -> None:
    seen: set[StepName] = set()
    for step in make_graph(spec(), FACTS).steps:
        assert seen.issuperset(step.needs)
        seen.add(step.name)


GATE = {"verify": {"gate": {"max_accuracy_drop": 0.02}}}
CALIBRATION = {"quantize": {"recipe": "fp8", "calibration": {"file": "yours.jsonl"}}}


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        (GATE, {V, P}),
        (CALIBRATION, {Q, C, T, V, P}),
        ({"quantize": {"recipe": "fp8", "calibration": {"file": "same.jsonl"}}}, set()),  # another name for it
        ({"quantize": {"recipe": "nvfp4", "calibration": {"file": "mine.jsonl"}}}, {Q, C, T, V, P}),
        ({"verify": {"texts": {"samples": 5}}}, {R, V, P}),
        ({"verify": {"golden_samples": 1}}, {V, P}),
        ({"tune": {"ttft_ms": 100}}, {C, T, V, P}),
        ({"compile": {"max_batch_size": 8}}, {C, T, V, P}),
        ({"parallel": {"tensor": 2}}, {R, C, T, V, P}),
        ({"engine": {"dtype": "float16"}}, {R, C, T, V, P}),
        ({"engine": {"trust_remote_code": True}}, EVERY - {F}),  # what fetch takes is in the source's digest
        ({"name": "other", "store": "/elsewhere", "aliases": ["prod"], "fallback": "transformers"}, set()),
        ({"source": "/another/place"}, set()),  # its content is a fact
        ({"target": {"accelerator": "H100", "num_cpus": 4, "time_limit_s": 5, "max_retries": 0}}, set()),
    ],
)
def test_a_change_of_the_specification_repeats_what_it_shapes(changes: dict[str, Any], steps: set[StepName]) -> None:
    assert changed(spec(**changes)) == steps


def test_a_format_with_a_file_a_rank_depends_on_the_layout() -> None:
    one, two = (spec(quantize="int4_awq", parallel={"tensor": ranks}) for ranks in (1, 2))
    assert fingerprints(one)[Q] != fingerprints(two)[Q]
    assert visible_spec(two, Q).parallel.tensor == 2
    unified = spec(parallel={"tensor": 2})
    assert visible_spec(unified, Q).parallel.tensor == 1


@pytest.mark.parametrize(
    ("node", "steps"),
    [
        ({"driver": "581.2"}, {C, T, V, P}),
        ({"machine": "aarch64"}, {C, T, V, P}),
        ({"gpus": (H100,) * 4}, set()),  # how many there are is the layout's matter
        ({"gpus": (H100.model_copy(update={"memory_bytes": H100.memory_bytes + 2**20}),)}, set()),
        ({"gpus": (H100.model_copy(update={"name": "NVIDIA H200", "memory_bytes": 150 * 2**30}),)}, {C, T, V, P}),
        ({"libraries": LIBRARIES | {"nvidia-modelopt": "0.48.0"}}, {Q, C, T, V, P}),
        ({"libraries": LIBRARIES | {"tensorrt_llm": "1.2.2"}}, {R, C, T, V, P}),
    ],
)
def test_a_change_of_the_node_repeats_what_depends_on_it(node: dict[str, Any], steps: set[StepName]) -> None:
    other = NODE.model_copy(update=node)
    assert changed(spec(), replace(FACTS, node=other, engine_node=other)) == steps


def test_other_texts_of_the_package_repeat_what_reads_them() -> None:
    assert changed(spec(), replace(FACTS, texts="others")) == EVERY - {F}


def test_a_change_of_the_source_repeats_all() -> None:
    assert changed(spec(), replace(FACTS, source="b" * 64)) == EVERY


@pytest.mark.parametrize("step", list(StepName))
def test_other_code_of_a_step_repeats_it_and_what_follows(step: StepName) -> None:
    found = changed(spec(), replace(FACTS, code={**FACTS.code, step: 2}))
    graph = make_graph(spec(), FACTS)
    assert found == {step} | {other.name for other in graph.steps if step in _all_needs(graph, other.name)}


def test_an_environment_of_the_engine_counts_for_the_steps_that_load_it() -> None:
    build = spec(target={"accelerator": "H100", "engine_env": {"py_executable": "/opt/python"}})
    engine_node = NODE.model_copy(update={"libraries": LIBRARIES | {"torch": "2.8.0"}})
    before, after = fingerprints(build), fingerprints(build, replace(FACTS, engine_node=engine_node))
    assert {step for step in EVERY if before[step] != after[step]} == {R, C, T, V, P}


def test_the_cpu_kind_does_not_depend_on_tensorrt_llm_or_on_gpus_that_it_does_not_take() -> None:
    build = parse_spec({"name": "m"})
    node = NODE.model_copy(update={"libraries": LIBRARIES | {"tensorrt_llm": "9"}, "gpus": (), "driver": None})
    assert fingerprints(build) == fingerprints(build, replace(FACTS, node=node, engine_node=node))


# A value that is not the default, for every part of a specification.
PARTS: dict[str, Any] = {
    "parallel": {"tensor": 2},
    "compile": {"max_num_tokens": 64},
    "tune": {"seed": 7},
    "engine": {"max_waiting": 9},
    "quantize": {"recipe": "nvfp4", "kv_cache": "fp8"},
    "verify": {"output_tokens": 5, "golden_samples": 2, "tasks": [{"name": "t", "file": "x", "metric": "regex"}]},
}
FILES = replace(FACTS, user_files={**FACTS.user_files, "x": "3" * 64})


@given(st.sets(st.sampled_from(sorted(PARTS))), st.sampled_from(list(StepName)))
def test_a_step_sees_nothing_that_its_fingerprint_does_not_cover(parts: set[str], step: StepName) -> None:
    # Otherwise it could make something else for the same fingerprint. All of `PUBLISH` is covered by what it needs.
    plain = parse_spec({"name": "m", "kind": "tensorrt-engine", "quantize": "fp8"})
    build = parse_spec({"name": "m", "kind": "tensorrt-engine", "quantize": "fp8"} | {p: PARTS[p] for p in parts})
    same = fingerprints(plain, FILES)[step] == fingerprints(build, FILES)[step]
    if step is not F:
        assert not same or visible_spec(plain, step) == visible_spec(build, step)


@given(st.sets(st.sampled_from(sorted(PARTS))), st.sampled_from(list(StepName)))
def test_what_a_step_sees_makes_the_same_fingerprint(parts: set[str], step: StepName) -> None:
    build = parse_spec({"name": "m", "kind": "tensorrt-engine", "quantize": "fp8"} | {p: PARTS[p] for p in parts})
    seen = visible_spec(build, step)
    assert visible_spec(seen, step) == seen
    assert set(files_of(seen, step)) == set(files_of(build, step))


@pytest.mark.parametrize("step", list(StepName))
def test_no_secret_gets_into_a_report(step: StepName) -> None:
    env = {"py_executable": "/opt/python", "env_vars": {"TOKEN": "secret"}}
    build = spec(
        source="https://user:secret@host/model",
        store="sftp://user:secret@host/store",
        target={"accelerator": "H100", "engine_env": env},
    )
    assert ("secret" in visible_spec(build, step).model_dump_json()) is (step is F)


def _all_needs(graph: BuildGraph, name: StepName) -> set[StepName]:
    direct = graph.node(name).needs
    return set(direct).union(*(_all_needs(graph, need) for need in direct))


def test_nothing_is_done_twice() -> None:
    graph = make_graph(spec(), FACTS)
    recorded = {graph.node(step).fingerprint for step in (F, R, Q)}
    states = graph.states(recorded, published=False)
    assert [states[step] for step in (F, R, Q)] == [StepState.CACHED] * 3
    assert [states[step] for step in (C, T, V, P)] == [StepState.RUN] * 4


def test_a_published_bundle_needs_no_step() -> None:
    states = make_graph(spec(), FACTS).states((), published=True)
    assert set(states.values()) == {StepState.NOT_NEEDED, StepState.CACHED}
    assert states[P] is StepState.CACHED


def test_what_only_finished_steps_read_is_not_made_again() -> None:
    """The reference is gone from the store, and publishing reads what verify made of it."""
    graph = make_graph(spec(), FACTS)
    recorded = {graph.node(step).fingerprint for step in (F, Q, C, T, V)}
    assert graph.states(recorded, published=False)[R] is StepState.NOT_NEEDED


@given(st.sets(st.sampled_from(list(StepName))), st.booleans())
def test_every_step_that_runs_finds_what_it_needs(recorded: set[StepName], published: bool) -> None:
    graph = make_graph(spec(), FACTS)
    states = graph.states({graph.node(step).fingerprint for step in recorded}, published)
    for step in graph.steps:
        if states[step.name] is StepState.RUN:
            assert StepState.NOT_NEEDED not in {states[need] for need in step.needs}
            assert step.name not in recorded
    assert published or StepState.RUN in states.values() or P in recorded
