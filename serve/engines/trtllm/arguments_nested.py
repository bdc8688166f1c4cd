"""Our sections of settings as calls of TensorRT-LLM's nested config classes. None means: not passed."""

from pathlib import Path
from typing import Any

from serve.engines.trtllm.call import ConstructorCall
from serve.engines.trtllm.line import Backend, Line
from serve.engines.trtllm.settings import TrtllmSettings
from serve.engines.trtllm.settings_cache import KvCacheSettings, KvConnectorSettings, KvTransferSettings
from serve.engines.trtllm.settings_execution import (
    AttentionDpSettings,
    CudaGraphSettings,
    EngineBuildSettings,
    LoraSettings,
    MoeSettings,
    QuantizationSettings,
    SchedulerSettings,
    TorchCompileSettings,
)
from serve.engines.trtllm.settings_speculation import (
    DraftModelSettings,
    Eagle3Settings,
    EagleSettings,
    MtpSettings,
    NgramSettings,
    SpeculationSettings,
)
from serve.errors import ConfigError

_ARGS = "tensorrt_llm.llmapi.llm_args"
_API = "tensorrt_llm.llmapi"
_LORA_CONFIG = {
    Line.V1_2: "tensorrt_llm.lora_helper:LoraConfig",
    Line.NEWEST: "tensorrt_llm._torch.peft.lora.config:LoraConfig",
}
_CUDA_GRAPH_CONFIG = {Line.V1_2: f"{_ARGS}:CudaGraphConfig", Line.NEWEST: f"{_ARGS}:DecodeCudaGraphConfig"}
_EAGLE3_CONFIG = {Line.V1_2: f"{_ARGS}:EagleDecodingConfig", Line.NEWEST: f"{_ARGS}:Eagle3DecodingConfig"}


def given(**keywords: Any) -> dict[str, Any]:
    """Return the keywords that have a value: None leaves the choice to TensorRT-LLM."""
    return {name: value for name, value in keywords.items() if value is not None}


def local_directory(path: str, setting: str) -> str:
    """Return an absolute path: TensorRT-LLM takes other strings for ids of a hub, which it downloads through MPI.

    Raises:
        ConfigError: The path is not absolute.
    """
    directory = Path(path).expanduser()
    if not directory.is_absolute():
        raise ConfigError(
            f"{setting}: {path!r} is no absolute path; download the checkpoint first, to the same directory on every "
            "node, and give that"
        )
    return str(directory)


def kv_cache(section: KvCacheSettings, line: Line) -> ConstructorCall:
    """Return the KvCacheConfig."""
    keywords = given(
        enable_block_reuse=section.block_reuse,
        free_gpu_memory_fraction=section.memory_fraction,
        max_tokens=section.max_tokens,
        max_gpu_total_bytes=section.max_gpu_bytes,
        max_attention_window=list(section.attention_windows) or None,
        sink_token_length=section.sink_tokens,
        host_cache_size=section.host_bytes or None,
        secondary_offload_min_priority=section.offload_min_priority,
        # Events name blocks that can be reused; without reuse there are none.
        event_buffer_max_size=section.event_buffer if section.block_reuse else 0,
        attention_dp_events_gather_period_ms=max(1, round(section.event_gather_s * 1000)),
        enable_partial_reuse=section.partial_reuse,
        copy_on_partial_reuse=section.copy_on_partial_reuse,
        use_uvm=section.unified_memory or None,
        dtype=section.dtype,
        mamba_ssm_cache_dtype=None if section.mamba_dtype == "auto" else section.mamba_dtype,
        tokens_per_block=section.tokens_per_block,
    )
    if line is Line.V1_2:
        keywords["onboard_blocks"] = section.onboard_from_host
    else:
        keywords |= given(
            disk_cache_size=section.disk_bytes or None,
            disk_cache_path=section.disk_directory,
            use_kv_cache_manager_v2=None if section.manager == "auto" else section.manager == "v2",
        )
    return ConstructorCall(f"{_API}:KvCacheConfig", keywords)


def scheduler(section: SchedulerSettings) -> ConstructorCall:
    """Return the SchedulerConfig."""
    dynamic = section.dynamic_batch
    return ConstructorCall(
        f"{_ARGS}:SchedulerConfig",
        given(
            capacity_scheduler_policy=section.capacity.upper(),
            context_chunking_policy=section.context_chunking and section.context_chunking.upper(),
            waiting_queue_policy=None if section.waiting_order == "fcfs" else section.waiting_order,
            dynamic_batch_config=dynamic
            and ConstructorCall(
                f"{_ARGS}:DynamicBatchConfig",
                {
                    "enable_batch_size_tuning": dynamic.batch_size,
                    "enable_max_num_tokens_tuning": dynamic.num_tokens,
                    "dynamic_batch_moving_average_window": dynamic.window,
                },
            ),
        ),
    )


def cuda_graphs(section: CudaGraphSettings, line: Line) -> ConstructorCall | None:
    """Return the CudaGraphConfig; None turns graphs off, as they are on by default."""
    if not section.enabled:
        return None
    sizes = sorted(set(section.batch_sizes))
    return ConstructorCall(
        _CUDA_GRAPH_CONFIG[line],
        given(
            batch_sizes=sizes or None,
            max_batch_size=None if sizes else section.max_batch_size,
            enable_padding=section.padding,
        ),
    )


def torch_compile(section: TorchCompileSettings) -> ConstructorCall:
    """Return the TorchCompileConfig."""
    return ConstructorCall(
        f"{_ARGS}:TorchCompileConfig",
        given(
            enable_fullgraph=section.full_graph,
            enable_inductor=section.inductor,
            enable_piecewise_cuda_graph=section.piecewise_cuda_graphs,
            capture_num_tokens=list(section.capture_num_tokens) or None,
            enable_userbuffers=section.user_buffers,
            max_num_streams=section.max_streams,
        ),
    )


def moe(section: MoeSettings) -> ConstructorCall:
    """Return the MoeConfig."""
    return ConstructorCall(
        f"{_ARGS}:MoeConfig",
        given(
            backend=section.backend,
            max_num_tokens=section.max_num_tokens,
            load_balancer=section.load_balancer and local_directory(section.load_balancer, "moe.load_balancer"),
            disable_finalize_fusion=not section.finalize_fusion,
            use_low_precision_moe_combine=section.low_precision_combine,
        ),
    )


def attention_dp(section: AttentionDpSettings) -> ConstructorCall:
    """Return the AttentionDpConfig."""
    return ConstructorCall(
        f"{_ARGS}:AttentionDpConfig",
        {
            "enable_balance": section.balance,
            "timeout_iters": section.balance_steps,
            "batching_wait_iters": section.batching_steps,
        },
    )


def kv_transfer(section: KvTransferSettings) -> ConstructorCall:
    """Return the CacheTransceiverConfig; without a backend the transceiver would stay off."""
    return ConstructorCall(
        f"{_ARGS}:CacheTransceiverConfig",
        given(
            backend=section.backend.upper(),
            max_tokens_in_buffer=section.buffer_tokens,
            kv_transfer_timeout_ms=section.timeout_s and max(1, round(section.timeout_s * 1000)),
            kv_transfer_sender_future_timeout_ms=max(1, round(section.sender_timeout_s * 1000)),
            transceiver_runtime=section.runtime and section.runtime.upper(),
        ),
    )


def kv_connector(section: KvConnectorSettings) -> ConstructorCall:
    """Return the KvCacheConnectorConfig."""
    return ConstructorCall(
        f"{_ARGS}:KvCacheConnectorConfig",
        {
            "connector_module": section.module,
            "connector_scheduler_class": section.scheduler_class,
            "connector_worker_class": section.worker_class,
        },
    )


def lora(section: LoraSettings, line: Line) -> dict[str, Any]:
    """Return the keywords about adapters."""
    cache = section.cache
    return given(
        enable_lora=True,
        lora_config=ConstructorCall(
            _LORA_CONFIG[line],
            given(
                lora_dir=[local_directory(path, "lora.preload") for path in section.preload] or None,
                lora_ckpt_source=section.source,
                max_lora_rank=section.max_rank,
                lora_target_modules=list(section.target_modules),
                max_loras=section.max_loaded,
                max_cpu_loras=section.max_cached,
            ),
        ),
        peft_cache_config=cache
        and ConstructorCall(
            f"{_ARGS}:PeftCacheConfig",
            {
                "host_cache_size": cache.host_bytes,
                "device_cache_percent": cache.device_fraction,
                "optimal_adapter_size": cache.optimal_rank,
                "max_adapter_size": cache.max_rank,
            },
        ),
    )


def speculation(section: SpeculationSettings, line: Line) -> ConstructorCall:
    """Return the decoding config: always an object, as 1.2.x cannot tell the kinds of dictionaries apart."""
    keywords: dict[str, Any] = {}
    if not isinstance(section, EagleSettings):
        keywords |= given(max_concurrency=section.max_batch_size)
    if not isinstance(section, MtpSettings):
        keywords["max_draft_len"] = section.draft_tokens
    if isinstance(section, DraftModelSettings | EagleSettings | Eagle3Settings):
        keywords["speculative_model"] = local_directory(section.model, "speculation.model")
    match section:
        case DraftModelSettings():
            return ConstructorCall(f"{_ARGS}:DraftTargetDecodingConfig", keywords)
        case EagleSettings():
            keywords["greedy_sampling"] = section.greedy
            return ConstructorCall(f"{_ARGS}:EagleDecodingConfig", keywords)
        case Eagle3Settings():
            keywords["eagle3_one_model"] = section.one_model
            keywords |= given(eagle3_layers_to_capture=sorted(set(section.layers)) or None)
            return ConstructorCall(_EAGLE3_CONFIG[line], keywords)
        case NgramSettings():
            keywords |= {
                "max_matching_ngram_size": section.match_tokens,
                "is_keep_all": section.keep_all,
                "is_use_oldest": section.use_oldest,
                "is_public_pool": section.shared,
            }
            return ConstructorCall(f"{_ARGS}:NGramDecodingConfig", keywords)
        case MtpSettings():
            # The newest line deprecated the name of 1.2.x, and takes the number of layers from the checkpoint.
            keywords["num_nextn_predict_layers" if line is Line.V1_2 else "max_draft_len"] = section.draft_tokens
            keywords |= {
                "use_relaxed_acceptance_for_thinking": section.relaxed_thinking,
                "relaxed_topk": section.relaxed_top_k,
                "relaxed_delta": section.relaxed_delta,
            }
            return ConstructorCall(f"{_ARGS}:MTPDecodingConfig", keywords)


def quantization(section: QuantizationSettings) -> dict[str, Any]:
    """Return the keywords about quantization while building (TensorRT backend)."""
    calibration = section.calibration
    return given(
        quant_config=ConstructorCall(
            f"{_API}:QuantConfig",
            given(
                quant_algo=section.algorithm,
                kv_cache_quant_algo=section.kv_cache_algorithm,
                group_size=section.group_size,
                smoothquant_val=section.smoothquant,
                exclude_modules=list(section.exclude_modules) or None,
            ),
        ),
        calib_config=calibration
        and ConstructorCall(
            f"{_API}:CalibConfig",
            {
                "device": calibration.device,
                "calib_dataset": calibration.dataset,
                "calib_batches": calibration.batches,
                "calib_batch_size": calibration.batch_size,
                "calib_max_seq_length": calibration.max_sequence_tokens,
                "random_seed": calibration.seed,
            },
        ),
    )


def build(settings: TrtllmSettings) -> dict[str, Any]:
    """Return the keywords about building an engine from a checkpoint (TensorRT backend)."""
    section: EngineBuildSettings = settings.build
    plugins = given(gemm_plugin=section.gemm_plugin, tokens_per_block=settings.kv_cache.tokens_per_block)
    return given(
        build_config=ConstructorCall(
            f"{_API}:BuildConfig",
            given(
                max_batch_size=settings.max_batch_size,
                max_num_tokens=settings.max_num_tokens,
                max_seq_len=settings.context_tokens,
                max_input_len=section.max_input_tokens,
                opt_batch_size=section.opt_batch_size,
                opt_num_tokens=section.opt_num_tokens,
                gather_context_logits=section.prompt_logprobs or None,
                gather_generation_logits=section.logprobs or None,
                plugin_config=ConstructorCall("tensorrt_llm.plugin:PluginConfig", plugins),
            ),
        ),
        gather_generation_logits=section.logprobs or None,
        fast_build=section.fast or None,
        enable_build_cache=section.cache_directory
        and ConstructorCall(
            "tensorrt_llm.llmapi:BuildCacheConfig",
            {"cache_root": local_directory(section.cache_directory, "build.cache_directory")},
        ),
        workspace=section.workspace_directory
        and local_directory(section.workspace_directory, "build.workspace_directory"),
    )


def telemetry_off(line: Line, backend: Backend) -> ConstructorCall | None:
    """Return what keeps the newest line from reporting its usage, which it does by default."""
    if line is Line.V1_2 or backend is Backend.TENSORRT:
        return None
    return ConstructorCall(f"{_ARGS}:TelemetryConfig", {"disabled": True})
