"""Keywords that one backend alone has: PyTorch's, and the TensorRT backend's of 1.2.x."""

from typing import Any

from serve.engines.trtllm import arguments_nested as nested
from serve.engines.trtllm.arguments_nested import given
from serve.engines.trtllm.call import ConstructorCall
from serve.engines.trtllm.line import Line
from serve.engines.trtllm.model_directory import DirectoryKind, ModelDirectory
from serve.engines.trtllm.settings import TrtllmSettings
from serve.engines.trtllm.settings_execution import MoeSettings
from serve.errors import ConfigError


def pytorch_keywords(settings: TrtllmSettings, line: Line) -> dict[str, Any]:
    """Return what the PyTorch backend takes beside the common keywords."""
    wait = settings.batch_wait
    keywords = given(
        checkpoint_format=settings.checkpoint_format,
        disable_overlap_scheduler=not settings.overlap_scheduler,
        enable_autotuner=settings.autotuner,
        attn_backend=settings.attention_backend,
        allreduce_strategy=settings.allreduce,
        enable_min_latency=settings.min_latency or None,
        force_dynamic_quantization=settings.dynamic_quantization or None,
        stream_interval=settings.stream_interval_tokens,
        garbage_collection_gen0_threshold=settings.gc_threshold,
        batch_wait_timeout_ms=wait.timeout_s * 1000 or None,
        batch_wait_timeout_iters=wait.steps or None,
        batch_wait_max_tokens_ratio=wait.token_ratio or None,
        enable_iter_perf_stats=True,
        enable_iter_req_stats=settings.stats.requests,
        max_stats_len=settings.stats.queue,
        print_iter_log=settings.stats.step_log,
        moe_config=None if settings.moe == MoeSettings() else nested.moe(settings.moe),
        torch_compile_config=settings.torch_compile and nested.torch_compile(settings.torch_compile),
        kv_connector_config=settings.kv_connector and nested.kv_connector(settings.kv_connector),
    )
    if settings.nvfp4_gemm:
        keywords["nvfp4_gemm_config"] = ConstructorCall(
            "tensorrt_llm.llmapi.llm_args:Nvfp4GemmConfig", {"allowed_backends": list(settings.nvfp4_gemm)}
        )
    keywords["cuda_graph_config"] = nested.cuda_graphs(settings.cuda_graphs, line)  # here None does mean something
    if settings.attention_dp.enabled:
        keywords |= given(
            enable_attention_dp=True,
            attention_dp_config=nested.attention_dp(settings.attention_dp),
            enable_lm_head_tp_in_adp=settings.attention_dp.tensor_parallel_head or None,
        )
    return keywords | _pytorch_of_line(settings, line)


def _pytorch_of_line(settings: TrtllmSettings, line: Line) -> dict[str, Any]:
    if line is Line.V1_2:
        sampler = {"auto": None, "trtllm": "TRTLLMSampler", "torch": "TorchSampler"}[settings.sampler]
        return given(sampler_type=sampler, enable_sleep=settings.sleep or None)
    return given(
        checkpoint_io_policy=None if settings.checkpoint_io == "auto" else settings.checkpoint_io,
        model_kwargs=settings.model_overrides or None,
        sleep_config=ConstructorCall("tensorrt_llm.llmapi.llm_args:SleepConfig", {}) if settings.sleep else None,
    )


def tensorrt_keywords(settings: TrtllmSettings, model: ModelDirectory) -> dict[str, Any]:
    """Return what the TensorRT backend takes beside the common keywords.

    Raises:
        ConfigError: A checkpoint would have to be quantized again.
    """
    # Its executor keeps records of steps by these two; the PyTorch flags do not exist there.
    keywords = given(
        iter_stats_max_iterations=settings.stats.queue,
        request_stats_max_iterations=settings.stats.queue if settings.stats.requests else None,
    )
    if model.built is None:
        return keywords | _build_keywords(settings, model)
    return keywords | given(gather_generation_logits=model.built.gather_generation_logits or None)


def _build_keywords(settings: TrtllmSettings, model: ModelDirectory) -> dict[str, Any]:
    if settings.quantization is None:
        return nested.build(settings)
    if model.kind is DirectoryKind.CHECKPOINT:
        raise ConfigError(
            f"engine.quantization: {model.path} is a TensorRT-LLM checkpoint, quantized already or not "
            "at all; remove the section, or give the Hugging Face checkpoint"
        )
    return nested.build(settings) | nested.quantization(settings.quantization)
