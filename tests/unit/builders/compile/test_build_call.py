"""What an engine is built with: every field decided, by names that the library has."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from builders.compile.build_call import plan_build, runtime_section
from builders.compile.command_line import trtllm_build_command
from builders.compile.decisions import Decision, Subject, build_decisions, plugin_decisions
from builders.compile.sizes import EngineSizes
from builders.settings.compile import CompileSettings
from serve.core.parallel import ParallelLayout
from serve.engines.trtllm.built_engine import check_built
from serve.engines.trtllm.call import ConstructorCall
from serve.engines.trtllm.line import Line
from serve.engines.trtllm.model_directory import BuiltEngine, ModelDirectory
from serve.engines.trtllm.orchestration import Orchestration
from serve.engines.trtllm.settings import TrtllmSettings
from serve.engines.trtllm.signature_data import packaged
from serve.errors import ConfigError

REASONS = dict.fromkeys(("max_batch_size", "max_num_tokens", "max_input_tokens", "context_tokens"), "asked for")
SUBJECT = Subject(
    sizes=EngineSizes(64, 4096, 2048, 8192, REASONS),
    settings=TrtllmSettings(),
    compiled=CompileSettings(),
    layout=ParallelLayout(),
    dtype="bfloat16",
    algorithm=None,
    kv_algorithm=None,
    experts=False,
    timing_cache_in=None,
    timing_cache_out="/scratch/timing.cache",
)
MODEL = ModelDirectory(Path("/models/llama"))


def named(decisions: tuple[Decision, ...]) -> dict[str, Decision]:
    return {decision.name: decision for decision in decisions}


def plugins(**changes: Any) -> dict[str, Any]:
    return {name: decision.value for name, decision in named(plugin_decisions(replace(SUBJECT, **changes))).items()}


def plan(subject: Subject = SUBJECT, line: Line = Line.V1_2) -> ConstructorCall:
    return plan_build(subject, MODEL, Orchestration("in_process"), line, "1.2.1").plan.call


def test_every_field_of_the_library_s_configs_is_decided_once_and_no_other() -> None:
    classes = packaged(Line.V1_2)
    config, plugin = build_decisions(SUBJECT), plugin_decisions(SUBJECT)
    assert named(config).keys() | {"plugin_config"} == classes["tensorrt_llm.llmapi:BuildConfig"].keys()
    assert named(plugin).keys() == classes["tensorrt_llm.plugin:PluginConfig"].keys()
    assert len(named(config)) == len(config)
    assert len(named(plugin)) == len(plugin)
    assert all(len(decision.reason) > 5 for decision in (*config, *plugin))


def test_the_call_has_the_sizes_in_its_build_config_and_nowhere_else() -> None:
    keywords = plan().keywords
    build = keywords["build_config"].keywords
    assert (build["max_batch_size"], build["max_num_tokens"], build["max_seq_len"]) == (64, 4096, 8192)
    assert not {"max_batch_size", "max_num_tokens", "max_seq_len", "enable_build_cache"} & keywords.keys()
    assert (
        build["plugin_config"].keywords["tokens_per_block"] == keywords["kv_cache_config"].keywords["tokens_per_block"]
    )


@pytest.mark.parametrize(
    ("algorithm", "kv_algorithm", "gemm", "fp8_attention"),
    [
        (None, None, "auto", False),
        ("FP8", None, None, False),
        ("FP8", "FP8", None, True),
        ("W4A16_AWQ", "FP8", "auto", False),
        ("W8A8_SQ_PER_CHANNEL", None, None, False),
        ("NVFP4", "FP8", "nvfp4", False),
    ],
)
def test_kernels_follow_the_quantization(
    algorithm: str | None, kv_algorithm: str | None, gemm: str | None, fp8_attention: bool
) -> None:
    chosen = plugins(algorithm=algorithm, kv_algorithm=kv_algorithm)
    assert chosen["gemm_plugin"] == gemm
    assert chosen["use_fp8_context_fmha"] is fp8_attention
    assert chosen["use_paged_context_fmha"] is True  # or KV blocks would not be reused


def test_the_operator_s_wishes_count() -> None:
    settings = TrtllmSettings.model_validate(
        {"build": {"gemm_plugin": "float16", "logprobs": True, "fast": True}, "kv_cache": {"tokens_per_block": 64}}
    )
    subject = replace(SUBJECT, settings=settings, compiled=CompileSettings(multiple_profiles=False))
    config, chosen = named(build_decisions(subject)), named(plugin_decisions(subject))
    assert chosen["gemm_plugin"].value == "float16"
    assert chosen["tokens_per_block"].value == 64
    assert chosen["manage_weights"].value is True
    assert chosen["multiple_profiles"].value is False
    assert config["gather_generation_logits"].value is True
    assert config["gather_context_logits"].value is False
    assert plan(subject).keywords["fast_build"] is True


def test_several_ranks_talk_through_nccl() -> None:
    assert plugins()["nccl_plugin"] is None
    assert plugins(layout=ParallelLayout(tensor=2))["nccl_plugin"] == "auto"


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (
            {"build": {"cache_directory": "/cache"}},
            r"cache_directory: the library's cache does not tell GPU models apart",
        ),
        ({"quantization": {"algorithm": "FP8"}}, r"engine\.quantization: .* use the build's quantize section"),
        ({"speculation": {"kind": "eagle", "model": "/draft", "draft_tokens": 4}}, r"engine\.speculation"),
        ({"lora": {"target_modules": ["attn_q"]}}, r"engine\.lora: .*remove it"),
        ({"cuda_graphs": {"enabled": False}}, r"cuda_graphs: .* does not have this setting"),
    ],
)
def test_settings_that_an_engine_cannot_have(section: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        plan(replace(SUBJECT, settings=TrtllmSettings.model_validate(section)))


def test_the_newest_line_builds_no_engines() -> None:
    with pytest.raises(ConfigError, match=r"builds no engines any more; use kind: trtllm-checkpoint"):
        plan(line=Line.NEWEST)


def test_a_served_engine_takes_the_runtime_settings() -> None:
    section = runtime_section(SUBJECT)
    built = BuiltEngine("1.2.1", 1, 1, 1, 64, 4096, 8192, 32)
    check_built(TrtllmSettings.model_validate(section), ParallelLayout(), built, "1.2.1")


def test_the_command_line_says_the_same() -> None:
    subject = replace(SUBJECT, layout=ParallelLayout(tensor=2), timing_cache_in="/kept/a b.cache")
    text = trtllm_build_command(build_decisions(subject), plugin_decisions(subject), "/ckpt", "/engine", 2)
    words = text.replace("\\\n", " ").split()
    pairs = dict(pairwise(words))
    assert pairs["--max_seq_len"] == "8192"
    assert pairs["--use_paged_context_fmha"] == "enable"
    assert pairs["--reduce_fusion"] == "disable"
    assert pairs["--gemm_plugin"] == "auto"
    assert pairs["--workers"] == "2"
    assert "--gather_context_logits" not in words
    assert "'/kept/a b.cache'" in text
