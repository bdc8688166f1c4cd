"""The constructor call, and the traps of TensorRT-LLM's constructors; `trap_X_Y` refers to docs/trtllm-traps.md."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from serve.core.parallel import ParallelLayout
from serve.engines.trtllm.arguments import EnginePlan, plan_engine
from serve.engines.trtllm.call import ConstructorCall
from serve.engines.trtllm.line import Backend, Line
from serve.engines.trtllm.model_directory import DirectoryKind, ModelDirectory, read_model_directory
from serve.engines.trtllm.orchestration import Orchestration
from serve.engines.trtllm.settings import TrtllmSettings
from serve.engines.trtllm.signature_data import check_names
from serve.errors import BundleMismatch, ConfigError

HF = ModelDirectory(Path("/models/one"), tokenizer=Path("/models/one"))
BOTH = pytest.mark.parametrize("line", list(Line))


def plan(
    line: Line = Line.V1_2,
    layout: ParallelLayout | None = None,
    orchestration: Orchestration | None = None,
    model: ModelDirectory = HF,
    version: str | None = None,
    **settings: Any,
) -> EnginePlan:
    layout = layout or ParallelLayout()
    made = TrtllmSettings.model_validate(settings)
    kind = orchestration or Orchestration("in_process" if layout.world_size == 1 else "mpi")
    return plan_engine(made, layout, kind, model, line, version)


def keywords(*args: Any, **settings: Any) -> Mapping[str, Any]:
    return plan(*args, **settings).call.keywords


def nested(*args: Any, name: str, **settings: Any) -> Mapping[str, Any]:
    call = keywords(*args, **settings)[name]
    assert isinstance(call, ConstructorCall)
    return call.keywords


def engine_directory(folder: Path, tensor: int = 1, pipeline: int = 1, version: str = "1.2.1") -> ModelDirectory:
    config = {
        "version": version,
        "pretrained_config": {"mapping": {"tp_size": tensor, "pp_size": pipeline, "world_size": tensor * pipeline}},
        "build_config": {
            "max_batch_size": 64,
            "max_num_tokens": 4096,
            "max_seq_len": 8192,
            "plugin_config": {"tokens_per_block": 32},
        },
    }
    folder.joinpath("config.json").write_text(json.dumps(config))
    for rank in range(tensor * pipeline):
        folder.joinpath(f"rank{rank}.engine").touch()
    return read_model_directory(folder)


@BOTH
def test_text_work_stays_in_the_gateway_and_events_and_statistics_are_on(line: Line) -> None:
    passed = keywords(line)
    assert passed["skip_tokenizer_init"] is True
    assert passed["enable_iter_perf_stats"] is True
    assert passed["kv_cache_config"].keywords["event_buffer_max_size"] > 0
    assert "max_beam_width" not in passed


@BOTH
def test_grammars_need_the_tokenizer(line: Line) -> None:
    passed = keywords(line, guided_decoding="xgrammar")
    assert "skip_tokenizer_init" not in passed
    assert passed["tokenizer"] == "/models/one"
    with pytest.raises(ConfigError, match="no tokenizer, which guided_decoding"):
        plan(line, model=ModelDirectory(Path("/models/one")), guided_decoding="xgrammar")


@BOTH
def test_experts_are_a_share_of_the_tensor_ranks(line: Line) -> None:
    passed = keywords(line, ParallelLayout(tensor=4, pipeline=2, expert=2))
    assert (passed["tensor_parallel_size"], passed["pipeline_parallel_size"]) == (4, 2)
    assert (passed["moe_expert_parallel_size"], passed["moe_tensor_parallel_size"]) == (2, 2)


@BOTH
def test_no_cuda_graphs_is_an_explicit_none_as_they_are_on_by_default(line: Line) -> None:
    assert keywords(line, cuda_graphs={"enabled": False})["cuda_graph_config"] is None


def test_context_of_disaggregation_has_a_backend_or_the_transceiver_would_stay_off() -> None:
    assert nested(name="cache_transceiver_config", kv_transfer={})["backend"] == "DEFAULT"


# Traps: section 1, as far as it belongs to section 5 or 7


def test_trap_7_4_26_an_unknown_name_is_refused_before_the_library_refuses_it() -> None:
    made = plan(extra={"kv_cache_config": {"disk_cache_size": 1}})
    with pytest.raises(ConfigError, match=r"KvCacheConfig of TensorRT-LLM 1\.2\.x has no keyword 'disk_cache_size'"):
        check_names(made.call, Line.V1_2)
    check_names(plan(Line.NEWEST, extra={"kv_cache_config": {"disk_cache_size": 1}}).call, Line.NEWEST)


def test_trap_7_4_26_a_misspelt_name_is_told_its_neighbour() -> None:
    with pytest.raises(ConfigError, match="did you mean 'sparse_attention_config'"):
        check_names(plan(extra={"sparse_attention_confg": {}}).call, Line.V1_2)


def test_names_inside_dictionaries_of_extra_are_checked_too() -> None:
    made = plan(Line.NEWEST, extra={"scheduler_config": {"wait_policy": 1}})
    with pytest.raises(ConfigError, match="SchedulerConfig of TensorRT-LLM newest has no keyword 'wait_policy'"):
        check_names(made.call, Line.NEWEST)


@pytest.mark.parametrize("name", ["model", "skip_tokenizer_init", "orchestrator_type", "max_beam_width"])
def test_extra_cannot_replace_what_raytrt_decides(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"engine\.extra\.{name}: RayTRT decides this itself"):
        plan(extra={name: 1})


@pytest.mark.parametrize("extra", [{"dtype": "float16"}, {"kv_cache_config": {"dtype": "fp8"}}])
def test_extra_cannot_contradict_a_setting(extra: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"engine\.extra\..*follow"):
        plan(extra=extra)


def test_trap_7_4_27_what_was_renamed_or_removed_is_decided_in_one_place() -> None:
    old, new = plan(Line.V1_2, sleep=True).call, plan(Line.NEWEST, sleep=True).call
    assert old.keywords["enable_sleep"] is True
    assert new.keywords["sleep_config"].class_name == "SleepConfig"
    assert old.keywords["kv_cache_config"].keywords["onboard_blocks"] is True
    assert "onboard_blocks" not in new.keywords["kv_cache_config"].keywords
    assert old.keywords["cuda_graph_config"].class_name == "CudaGraphConfig"
    assert new.keywords["cuda_graph_config"].class_name == "DecodeCudaGraphConfig"


def test_the_newest_line_cannot_leave_blocks_on_the_host() -> None:
    with pytest.raises(ConfigError, match=r"kv_cache\.onboard_from_host: TensorRT-LLM newest does not have"):
        plan(Line.NEWEST, kv_cache={"onboard_from_host": False})


def test_the_class_of_adapters_moved() -> None:
    lora = {"target_modules": ["attn_q"]}
    assert keywords(Line.V1_2, lora=lora)["lora_config"].target == "tensorrt_llm.lora_helper:LoraConfig"
    assert keywords(Line.NEWEST, lora=lora)["lora_config"].target == "tensorrt_llm._torch.peft.lora.config:LoraConfig"


@BOTH
def test_speculation_is_an_object_as_1_2_cannot_tell_dictionaries_apart(line: Line) -> None:
    call = keywords(line, speculation={"kind": "ngram"})["speculative_config"]
    assert isinstance(call, ConstructorCall)
    assert call.class_name == "NGramDecodingConfig"


@pytest.mark.parametrize(("line", "name"), [(Line.V1_2, "num_nextn_predict_layers"), (Line.NEWEST, "max_draft_len")])
def test_the_number_of_predicted_tokens_has_two_names(line: Line, name: str) -> None:
    assert nested(line, name="speculative_config", speculation={"kind": "mtp", "draft_tokens": 3})[name] == 3


@pytest.mark.parametrize(("line", "name"), [(Line.V1_2, "EagleDecodingConfig"), (Line.NEWEST, "Eagle3DecodingConfig")])
def test_eagle3_has_a_class_of_its_own_in_the_newest_line(line: Line, name: str) -> None:
    call = keywords(line, speculation={"kind": "eagle3", "model": "/head"})["speculative_config"]
    assert call.class_name == name


def test_trap_7_1_6_the_newest_line_reports_no_usage_unless_asked() -> None:
    silent = plan(Line.NEWEST)
    assert silent.call.keywords["telemetry_config"].keywords == {"disabled": True}
    assert silent.environ["TRTLLM_NO_USAGE_STATS"] == "1"
    assert "telemetry_config" not in plan(Line.NEWEST, telemetry=True).call.keywords
    assert "telemetry_config" not in plan(Line.V1_2).call.keywords


def test_trap_7_1_5_variables_are_set_before_the_import_and_reach_the_ranks() -> None:
    made = plan(environment={"NCCL_DEBUG": "INFO"})
    assert made.environ["NCCL_DEBUG"] == "INFO"
    assert made.call.keywords["env_overrides"] == {"NCCL_DEBUG": "INFO"}


def test_trap_7_4_23_nccl_can_be_chosen_where_gpus_have_no_nvlink() -> None:
    assert keywords(allreduce="NCCL")["allreduce_strategy"] == "NCCL"


def test_trap_7_2_15_responses_of_several_tokens_can_be_asked_for() -> None:
    assert keywords(stream_interval_tokens=4)["stream_interval"] == 4


@BOTH
def test_trap_7_3_21_engines_that_share_a_gpu_can_be_given_bytes(line: Line) -> None:
    section = nested(line, name="kv_cache_config", kv_cache={"max_gpu_bytes": 1 << 30, "max_tokens": 4096})
    assert (section["max_gpu_total_bytes"], section["max_tokens"]) == (1 << 30, 4096)


# Section 4


RAY = Orchestration("ray", ("group",), ((1, 2),))


@BOTH
def test_trap_4_2_placement_is_an_explicit_config_which_leaves_the_group_to_serve(line: Line) -> None:
    passed = keywords(line, ParallelLayout(tensor=2), RAY)
    assert passed["orchestrator_type"] == "ray"
    assert passed["ray_placement_config"].keywords == {
        "placement_groups": ["group"],
        "placement_bundle_indices": [[1, 2]],
    }


@BOTH
def test_trap_4_2_the_placement_config_is_passed_to_the_ray_orchestrator_only(line: Line) -> None:
    passed = keywords(line, ParallelLayout(tensor=2), Orchestration("mpi"))
    assert not {"orchestrator_type", "ray_placement_config"} & set(passed)


@pytest.mark.parametrize("indices", [((1,),), ((1, 2, 3),), ((1, 2), (3,)), ()])
def test_trap_4_2_each_rank_has_one_bundle(indices: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ConfigError, match="each rank needs one bundle"):
        plan(layout=ParallelLayout(tensor=2), orchestration=Orchestration("ray", ("group",), indices))


def test_trap_4_3_post_processing_does_not_go_with_the_ray_orchestrator() -> None:
    with pytest.raises(ConfigError, match="postprocess_workers"):
        plan(layout=ParallelLayout(tensor=2), orchestration=RAY, postprocess_workers=1)


def test_trap_4_3_the_ray_orchestrator_runs_pytorch_only() -> None:
    with pytest.raises(ConfigError, match="ray runs the PyTorch backend only; use mpi"):
        plan(layout=ParallelLayout(tensor=2), orchestration=RAY, backend="tensorrt")


@BOTH
@pytest.mark.parametrize(
    ("layout", "gpus_per_node"),
    [
        (ParallelLayout(), 1),
        (ParallelLayout(tensor=4), 4),
        (ParallelLayout(tensor=2, pipeline=4, gpus_per_node=4), 4),
        (ParallelLayout(tensor=2, pipeline=2, gpus_per_node=3), 2),
        (ParallelLayout(tensor=2, gpus_per_node=8), 2),
    ],
)
def test_trap_1_2_gpus_per_node_is_told_and_not_guessed_from_visible_gpus(
    layout: ParallelLayout, gpus_per_node: int, line: Line
) -> None:
    orchestration = Orchestration("ray", ("group",), (tuple(range(layout.world_size)),))
    assert keywords(line, layout, orchestration)["gpus_per_node"] == gpus_per_node


@BOTH
@pytest.mark.parametrize("kind", ["draft_model", "eagle3"])
def test_trap_4_3b_a_hub_id_of_a_draft_is_refused_as_it_would_be_downloaded_through_mpi(line: Line, kind: str) -> None:
    with pytest.raises(ConfigError, match=r"speculation\.model: 'org/draft' is no absolute path; download"):
        plan(line, speculation={"kind": kind, "model": "org/draft"})


def test_trap_4_3b_the_model_is_always_an_absolute_local_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.joinpath("config.json").write_text("{}")
    monkeypatch.chdir(tmp_path.parent)
    model = read_model_directory(Path(tmp_path.name))
    assert keywords(model=model)["model"] == str(tmp_path)
    with pytest.raises(ConfigError, match=r"org/model has no config\.json.*the id of a model on a hub"):
        read_model_directory(Path("org/model"))


# Section 5


def test_trap_5_1_an_engine_directory_is_told_by_its_config(tmp_path: Path) -> None:
    model = engine_directory(tmp_path)
    made = plan(model=model)
    assert model.kind is DirectoryKind.ENGINE
    assert made.backend is Backend.TENSORRT
    assert made.call.target == "tensorrt_llm._tensorrt_engine:LLM"
    assert "build_config" not in made.call.keywords  # it would be ignored, with a warning


def test_trap_5_1_a_checkpoint_of_tensorrt_llm_is_told_by_its_config(tmp_path: Path) -> None:
    tmp_path.joinpath("config.json").write_text('{"architecture": "LlamaForCausalLM", "dtype": "bfloat16"}')
    model = read_model_directory(tmp_path)
    assert model.kind is DirectoryKind.CHECKPOINT
    assert plan(model=model).backend is Backend.TENSORRT


def test_trap_5_1_a_hugging_face_checkpoint_runs_on_pytorch(tmp_path: Path) -> None:
    tmp_path.joinpath("config.json").write_text('{"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}')
    model = read_model_directory(tmp_path)
    assert model.kind is DirectoryKind.HUGGING_FACE
    assert plan(model=model).backend is Backend.PYTORCH


@pytest.mark.parametrize(
    "layout", [ParallelLayout(tensor=4), ParallelLayout(tensor=2), ParallelLayout(pipeline=4)], ids=str
)
def test_trap_5_1_an_engine_cannot_be_cut_anew(tmp_path: Path, layout: ParallelLayout) -> None:
    model = engine_directory(tmp_path, tensor=2, pipeline=2)
    with pytest.raises(ConfigError, match=r"built for tensor=2, pipeline=2.*which cannot be changed"):
        plan(layout=layout, model=model)
    assert keywords(layout=ParallelLayout(tensor=2, pipeline=2), model=model)["tensor_parallel_size"] == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"max_batch_size": 128},
        {"max_num_tokens": 8192},
        {"context_tokens": 4096},
        {"context_tokens": 16384},
        {"kv_cache": {"tokens_per_block": 64}},
        {"dtype": "float16"},
        {"build": {"fast": True}},
        {"quantization": {"algorithm": "FP8"}},
    ],
)
def test_trap_5_1_what_an_engine_has_built_in_is_not_clamped_silently(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cannot be changed after the build"):
        plan(model=engine_directory(tmp_path), **settings)


def test_trap_5_1_a_smaller_batch_is_a_limit_of_the_run_time(tmp_path: Path) -> None:
    assert keywords(model=engine_directory(tmp_path), max_batch_size=32)["max_batch_size"] == 32


def test_trap_5_1_an_engine_directory_holds_no_tokenizer_unless_copied(tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    folder.mkdir()
    assert engine_directory(folder).tokenizer is None
    beside = tmp_path / "tokenizer"
    beside.mkdir()
    beside.joinpath("tokenizer.json").touch()
    assert engine_directory(folder).tokenizer == beside


def test_trap_5_1_the_tensorrt_backend_counts_steps_by_other_keywords() -> None:
    passed = keywords(backend="tensorrt", stats={"queue": 50, "requests": True})
    assert (passed["iter_stats_max_iterations"], passed["request_stats_max_iterations"]) == (50, 50)
    assert not {"enable_iter_perf_stats", "enable_iter_req_stats", "max_stats_len"} & set(passed)


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_cache": {"dtype": "fp8"}},
        {"guided_decoding": "llguidance"},
        {"speculation": {"kind": "eagle3", "model": "/head"}},
    ],
)
def test_trap_5_1_what_the_tensorrt_backend_refuses_is_refused_with_a_remedy(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"the tensorrt backend of TensorRT-LLM 1\.2\.x does not have"):
        plan(model=engine_directory(tmp_path), **settings)


def test_trap_5_1_log_probabilities_of_the_tensorrt_backend_are_built_in() -> None:
    passed = keywords(backend="tensorrt", build={"logprobs": True, "prompt_logprobs": True})
    build = passed["build_config"].keywords
    assert build["gather_context_logits"] is True
    assert build["gather_generation_logits"] is True
    assert passed["gather_generation_logits"] is True


def test_trap_5_1_sizes_of_a_build_go_into_the_build_config_which_overrides_keywords() -> None:
    build = nested(name="build_config", backend="tensorrt", max_batch_size=8, max_num_tokens=512, context_tokens=1024)
    assert (build["max_batch_size"], build["max_num_tokens"], build["max_seq_len"]) == (8, 512, 1024)


def test_trap_5_1_a_build_at_every_start_is_told() -> None:
    assert any("built at every start" in note for note in plan(backend="tensorrt").notes)


def test_trap_5_3_a_wrong_name_of_a_plugin_is_not_dropped_silently() -> None:
    made = plan(backend="tensorrt", extra={"build_config": {"plugin_confg": {}}})
    with pytest.raises(
        ConfigError, match=r"BuildConfig .* has no keyword 'plugin_confg'; did you mean 'plugin_config'"
    ):
        check_names(made.call, Line.V1_2)


def test_trap_5_4_pytorch_takes_its_quantization_from_the_checkpoint() -> None:
    with pytest.raises(ConfigError, match=r"quantization: .*ModelOpt.*kv_cache\.dtype"):
        plan(quantization={"algorithm": "FP8"})
    assert "quant_config" not in keywords()


def test_trap_5_4_a_checkpoint_of_tensorrt_llm_is_not_quantized_again(tmp_path: Path) -> None:
    tmp_path.joinpath("config.json").write_text('{"architecture": "LlamaForCausalLM", "dtype": "bfloat16"}')
    with pytest.raises(ConfigError, match="quantized already or not"):
        plan(model=read_model_directory(tmp_path), quantization={"algorithm": "FP8"})


def test_trap_5_5_no_build_cache_unless_a_directory_is_named_for_it() -> None:
    assert "enable_build_cache" not in keywords(backend="tensorrt")
    cache = nested(name="enable_build_cache", backend="tensorrt", build={"cache_directory": "/engines/h100"})
    assert cache == {"cache_root": "/engines/h100"}


def test_trap_5_6_an_engine_of_another_version_is_refused_before_gpu_memory_is_taken(tmp_path: Path) -> None:
    model = engine_directory(tmp_path, version="1.2.0")
    with pytest.raises(BundleMismatch, match=r"built by TensorRT-LLM 1\.2\.0, but 1\.2\.1 is installed"):
        plan(model=model, version="1.2.1")
    assert plan(model=model, version="1.2.0").model.built is not None


def test_trap_5_6_an_engine_without_the_files_of_a_rank_is_refused(tmp_path: Path) -> None:
    engine_directory(tmp_path, tensor=2)
    tmp_path.joinpath("rank1.engine").unlink()
    with pytest.raises(ConfigError, match=r"lacks rank1\.engine"):
        read_model_directory(tmp_path)


def test_trap_5_8_the_newest_line_loads_no_engines(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot load any more; give the Hugging Face checkpoint"):
        plan(Line.NEWEST, model=engine_directory(tmp_path))


def test_trap_5_8_the_newest_line_has_no_tensorrt_backend() -> None:
    with pytest.raises(ConfigError, match="newest has no tensorrt backend"):
        plan(Line.NEWEST, backend="tensorrt")


@BOTH
def test_trap_5_8_the_backend_is_never_named_to_the_constructor(line: Line) -> None:
    assert "backend" not in keywords(line)


def test_pipeline_layers_are_one_number_for_each_stage() -> None:
    with pytest.raises(ConfigError, match=r"2 numbers for parallel\.pipeline=1"):
        plan(pipeline_layers=[3, 4])
