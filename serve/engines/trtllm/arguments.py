"""From our settings, the layout and the orchestration to the constructor call of the installed line. A pure function.

Sources: the constructors' signatures in `signatures/`, and their validators as published with 1.2.1 and 1.3.0rc29.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve.core.parallel import ParallelLayout
from serve.engines.trtllm import arguments_nested as nested
from serve.engines.trtllm.arguments_backend import pytorch_keywords, tensorrt_keywords
from serve.engines.trtllm.arguments_nested import given
from serve.engines.trtllm.built_engine import check_built
from serve.engines.trtllm.call import ConstructorCall
from serve.engines.trtllm.line import Backend, Line
from serve.engines.trtllm.model_directory import DirectoryKind, ModelDirectory
from serve.engines.trtllm.orchestration import Orchestration, local_ranks
from serve.engines.trtllm.settings import TrtllmSettings
from serve.engines.trtllm.signature_data import merge_extra
from serve.engines.trtllm.support import unsupported
from serve.errors import ConfigError

_CLASSES = {Backend.PYTORCH: "tensorrt_llm:LLM", Backend.TENSORRT: "tensorrt_llm._tensorrt_engine:LLM"}
_NO_USAGE_REPORTS = "TRTLLM_NO_USAGE_STATS"


@dataclass(frozen=True)
class EnginePlan:
    """How an engine will be made.

    Attributes:
        line, backend: Of TensorRT-LLM.
        model: What is loaded.
        call: Of the LLM class.
        environ: Variables to set before TensorRT-LLM is imported; None removes one.
        notes: What an operator should know, one sentence each.
    """

    line: Line
    backend: Backend
    model: ModelDirectory
    call: ConstructorCall
    environ: Mapping[str, str | None]
    notes: tuple[str, ...] = ()


def plan_engine(
    settings: TrtllmSettings,
    layout: ParallelLayout,
    orchestration: Orchestration,
    model: ModelDirectory,
    line: Line,
    version: str | None = None,
) -> EnginePlan:
    """Decide everything about the constructor call.

    Args:
        settings: The engine's section of the configuration.
        layout: How the engine is cut.
        orchestration: Who starts the ranks.
        model: What the model directory holds.
        line: Of the TensorRT-LLM that will make the call.
        version: Of it, to compare with an engine's; None: not known.

    Raises:
        ConfigError: Something is asked for that this line, backend, model or orchestration does not have.
        BundleMismatch: The engine was built by another version.
    """
    backend = choose_backend(settings, model, line)
    mistakes = unsupported(settings, line, backend)
    if mistakes:
        raise ConfigError("\n".join(f"engine.{mistake}" for mistake in mistakes))
    keywords = _common(settings, layout, model, line)
    if model.built is not None:
        check_built(settings, layout, model.built, version)
    if backend is Backend.TENSORRT:
        keywords |= tensorrt_keywords(settings, model)
    else:
        keywords |= pytorch_keywords(settings, line)
    keywords |= _ranks(layout, orchestration, backend, settings)
    keywords |= given(telemetry_config=None if settings.telemetry else nested.telemetry_off(line, backend))
    call = merge_extra(ConstructorCall(_CLASSES[backend], keywords), settings.extra)
    environ = {**orchestration.environ, **settings.environment}
    if line is Line.NEWEST and not settings.telemetry:
        environ[_NO_USAGE_REPORTS] = "1"
    return EnginePlan(line, backend, model, call, environ, tuple(_notes(settings, model, backend)))


def choose_backend(settings: TrtllmSettings, model: ModelDirectory, line: Line) -> Backend:
    """Decide what runs the model.

    Raises:
        ConfigError: The line does not have the backend that the settings or the model directory need.
    """
    holds = f"{model.path} holds a {model.kind}"
    if model.kind is DirectoryKind.HUGGING_FACE:
        backend = Backend(settings.backend) if settings.backend != "auto" else Backend.PYTORCH
    elif settings.backend == "pytorch":
        raise ConfigError(f"engine.backend: {holds}, which the pytorch backend cannot load; use auto or tensorrt")
    elif line is not Line.V1_2:
        raise ConfigError(
            f"model: {holds}, which TensorRT-LLM {line} cannot load any more; give the Hugging Face checkpoint that it "
            "was made from, or install TensorRT-LLM 1.2.1"
        )
    else:
        backend = Backend.TENSORRT
    if backend is Backend.TENSORRT and line is not Line.V1_2:
        raise ConfigError(
            f"engine.backend: TensorRT-LLM {line} has no tensorrt backend; use pytorch or auto, or install 1.2.1"
        )
    return backend


def _common(settings: TrtllmSettings, layout: ParallelLayout, model: ModelDirectory, line: Line) -> dict[str, Any]:
    keywords = given(
        model=str(model.path),
        trust_remote_code=settings.trust_remote_code,
        dtype=settings.dtype,
        load_format=None if settings.load_format == "auto" else settings.load_format,
        tensor_parallel_size=layout.tensor,
        pipeline_parallel_size=layout.pipeline,
        pp_partition=_pipeline_layers(settings, layout),
        max_batch_size=settings.max_batch_size,
        max_num_tokens=settings.max_num_tokens,
        max_seq_len=settings.context_tokens,
        enable_chunked_prefill=settings.chunked_prefill,
        kv_cache_config=nested.kv_cache(settings.kv_cache, line),
        scheduler_config=nested.scheduler(settings.scheduler),
        cache_transceiver_config=settings.kv_transfer and nested.kv_transfer(settings.kv_transfer),
        guided_decoding_backend=settings.guided_decoding,
        return_perf_metrics=settings.stats.timings or None,
        speculative_config=settings.speculation and nested.speculation(settings.speculation, line),
        env_overrides=settings.environment or None,
    )
    keywords |= _tokenizer(settings, model)
    if layout.expert is not None:
        keywords["moe_expert_parallel_size"] = layout.expert
        keywords["moe_tensor_parallel_size"] = layout.tensor // layout.expert
    if settings.lora is not None:
        keywords |= nested.lora(settings.lora, line)
    return keywords


def _tokenizer(settings: TrtllmSettings, model: ModelDirectory) -> dict[str, Any]:
    """Text work is the gateway's; only grammars and post-processing workers need the vocabulary's texts."""
    if settings.guided_decoding is None and not settings.postprocess_workers:
        return {"skip_tokenizer_init": True}
    if model.tokenizer is None:
        raise ConfigError(
            f"model: {model.path} has no tokenizer, which guided_decoding and postprocess_workers need; copy "
            "tokenizer.json and tokenizer_config.json into it, or into a folder `tokenizer` beside it"
        )
    keywords: dict[str, Any] = {"tokenizer": str(model.tokenizer)}
    if settings.postprocess_workers:
        keywords["num_postprocess_workers"] = settings.postprocess_workers
        keywords["postprocess_tokenizer_dir"] = str(model.tokenizer)
    return keywords


def _pipeline_layers(settings: TrtllmSettings, layout: ParallelLayout) -> list[int] | None:
    stages = len(settings.pipeline_layers)
    if stages and stages != layout.pipeline:
        raise ConfigError(
            f"engine.pipeline_layers: {stages} numbers for parallel.pipeline={layout.pipeline} stages; "
            "give one for each"
        )
    return list(settings.pipeline_layers) or None


def _ranks(
    layout: ParallelLayout, orchestration: Orchestration, backend: Backend, settings: TrtllmSettings
) -> dict[str, Any]:
    world_size = layout.world_size
    if orchestration.kind == "in_process" and world_size > 1:
        raise ConfigError(
            f"engine.orchestrator: in_process has one rank, but parallel has {world_size}; use mpi or ray"
        )
    keywords: dict[str, Any] = {"gpus_per_node": local_ranks(layout)}
    if orchestration.kind != "ray":
        return keywords
    if backend is Backend.TENSORRT:
        raise ConfigError("engine.orchestrator: ray runs the PyTorch backend only; use mpi")
    if settings.postprocess_workers:
        raise ConfigError("engine.postprocess_workers: does not work with the ray orchestrator; use 0")
    bundles = sum(len(indices) for indices in orchestration.bundle_indices)
    if bundles != world_size or len(orchestration.bundle_indices) != len(orchestration.placement_groups):
        raise ConfigError(
            f"orchestration: {bundles} bundles of {len(orchestration.placement_groups)} placement groups for "
            f"{world_size} ranks; each rank needs one bundle"
        )
    # An explicit config: with the environment variables instead, TensorRT-LLM would remove Serve's group at shutdown.
    keywords["orchestrator_type"] = "ray"
    keywords["ray_placement_config"] = ConstructorCall(
        "tensorrt_llm.llmapi.llm_args:RayPlacementConfig",
        {
            "placement_groups": list(orchestration.placement_groups),
            "placement_bundle_indices": [list(indices) for indices in orchestration.bundle_indices],
        },
    )
    return keywords


def _notes(settings: TrtllmSettings, model: ModelDirectory, backend: Backend) -> list[str]:
    notes = []
    if backend is Backend.TENSORRT and model.built is None:
        notes.append("The engine is built at every start, which takes minutes to hours: build it once, and serve that.")
    if settings.load_format == "dummy":
        notes.append("load_format is dummy: the weights are random.")
    if not settings.chunked_prefill:
        notes.append("Without chunked_prefill, prompts longer than max_num_tokens are refused.")
    if settings.kv_transfer is not None and settings.overlap_scheduler and backend is Backend.PYTORCH:
        notes.append("kv_transfer: an engine that computes prompts for others needs overlap_scheduler: false.")
    if not settings.kv_cache.event_buffer or not settings.kv_cache.block_reuse:
        notes.append("The engine tells no KV events: requests cannot be routed by prefix.")
    return notes
