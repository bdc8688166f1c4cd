"""Every field of BuildConfig and PluginConfig of TensorRT-LLM 1.2.x: what it is set to, or left at, and why. PURE.

Sources: BuildConfig and PluginConfig as published (builder.py, plugin/plugin.py), NVIDIA's "Useful build-time flags",
and what the builder decides by itself from the quantization.
"""

from dataclasses import dataclass
from typing import Any

from builders.compile.sizes import EngineSizes
from builders.settings.compile import CompileSettings
from serve.core.parallel import ParallelLayout
from serve.engines.trtllm.settings import TrtllmSettings


@dataclass(frozen=True)
class Decision:
    """One field.

    Attributes:
        name: Of it.
        value: What it is set to; None together with `is_left`: the library's default.
        reason: Why.
        is_left: It is not passed.
    """

    name: str
    value: Any
    reason: str
    is_left: bool = False


@dataclass(frozen=True)
class Subject:
    """What an engine is built of.

    Attributes:
        sizes: That bound it.
        settings: Of the engine.
        compiled: The build's `compile` section.
        layout: How it is cut.
        dtype: Of weights and activations that are not quantized.
        algorithm: `quant_algo` of the checkpoint; None: it is not quantized.
        kv_algorithm: The same of the KV cache.
        experts: Whether it is a mixture of experts.
        timing_cache_in, timing_cache_out: Files; None: there is none yet.
    """

    sizes: EngineSizes
    settings: TrtllmSettings
    compiled: CompileSettings
    layout: ParallelLayout
    dtype: str
    algorithm: str | None
    kv_algorithm: str | None
    experts: bool
    timing_cache_in: str | None
    timing_cache_out: str


def build_decisions(subject: Subject) -> tuple[Decision, ...]:
    """Return a decision for each field of BuildConfig but `plugin_config`."""
    return (*_sizes(subject), *_outputs(subject), *_building(subject), *_unused())


def plugin_decisions(subject: Subject) -> tuple[Decision, ...]:
    """Return a decision for each field of PluginConfig."""
    return (*_attention(subject), *_products(subject), *_ranks(subject), *_plugins_by_library(), *_plugins_unused())


def _left(name: str, reason: str) -> Decision:
    return Decision(name, None, reason, is_left=True)


def _sizes(subject: Subject) -> tuple[Decision, ...]:
    sizes, build = subject.sizes, subject.settings.build
    why = sizes.reasons
    return (
        Decision("max_batch_size", sizes.max_batch_size, why["max_batch_size"]),
        Decision("max_num_tokens", sizes.max_num_tokens, why["max_num_tokens"]),
        Decision("max_seq_len", sizes.context_tokens, why["context_tokens"]),
        Decision("max_input_len", sizes.max_input_tokens, why["max_input_tokens"]),
        Decision("max_beam_width", 1, "requests cannot ask for beams"),
        Decision(
            "opt_batch_size",
            build.opt_batch_size or max(1, sizes.max_batch_size // 2),
            "kernels are chosen for it: a load that needs the largest batch is half of it on average",
        ),
        Decision(
            "opt_num_tokens",
            build.opt_num_tokens or sizes.max_batch_size,
            "most steps decode: a token for each sequence",
        ),
    )


def _outputs(subject: Subject) -> tuple[Decision, ...]:
    build = subject.settings.build
    on, off = "engine.build asks for it", "takes memory and time in every step; engine.build.{} turns it on"
    return (
        Decision(
            "gather_context_logits",
            build.prompt_logprobs,
            on if build.prompt_logprobs else off.format("prompt_logprobs"),
        ),
        Decision("gather_generation_logits", build.logprobs, on if build.logprobs else off.format("logprobs")),
    )


def _building(subject: Subject) -> tuple[Decision, ...]:
    return (
        Decision("strongly_typed", True, "types follow the network, as quantized layers need it"),
        Decision("profiling_verbosity", "layer_names_only", "enough to profile an engine, and takes no memory"),
        Decision(
            "input_timing_cache",
            subject.timing_cache_in,
            "timings of an earlier build on this GPU model and release" if subject.timing_cache_in else "there is none",
        ),
        Decision("output_timing_cache", subject.timing_cache_out, "kept with the bundle, and for the next build"),
        Decision("dry_run", False, "the engine is wanted"),
        Decision("enable_debug_output", False, "it would make every tensor an output"),
        Decision("monitor_memory", False, "the step tells its memory itself"),
        Decision("weight_streaming", False, "weights stay on the GPU: streaming them bounds the speed by PCIe"),
        Decision("use_refit", False, "other weights are another bundle"),
        Decision("use_strip_plan", False, "a bundle is whole"),
        Decision("weight_sparsity", False, "the checkpoint is dense"),
    )


def _unused() -> tuple[Decision, ...]:
    return (
        _left("kv_cache_type", "paged, as in-flight batching needs it"),
        _left("force_num_profiles", "follows from multiple_profiles"),
        _left("visualize_network", "nobody looks"),
        _left("max_prompt_embedding_table_size", "no prompt tuning: 0"),
        _left("max_encoder_input_len", "the model has no encoder"),
        _left("max_draft_len", "no speculation in an engine: 0"),
        _left("speculative_decoding_mode", "no speculation in an engine"),
        _left("lora_config", "requests cannot name an adapter"),
        _left("use_mrope", "positions are one number"),
    )


def _attention(subject: Subject) -> tuple[Decision, ...]:
    fp8 = subject.algorithm == "FP8" and subject.kv_algorithm == "FP8"
    block = subject.settings.kv_cache.tokens_per_block
    return (
        Decision("dtype", subject.dtype, "of the checkpoint"),
        Decision("gpt_attention_plugin", "auto", "the attention that in-flight batching needs"),
        Decision("context_fmha", True, "fused attention for prompts"),
        Decision("remove_input_padding", True, "sequences of a batch have lengths of their own"),
        Decision("paged_kv_cache", True, "KV blocks are given out as sequences grow"),
        Decision("use_paged_context_fmha", True, "reuse of KV blocks and prompts in pieces need it"),
        Decision(
            "use_fp8_context_fmha",
            fp8,
            "weights and KV cache are FP8: prompts' attention is computed in it, too"
            if fp8
            else "needs weights and a KV cache in FP8",
        ),
        Decision("tokens_per_block", block, "the run time's KV blocks (engine.kv_cache.tokens_per_block)"),
        Decision("streamingllm", False, "attention sees the whole context"),
        Decision(
            "multiple_profiles", subject.compiled.multiple_profiles, "kernels for small batches and for large ones"
        ),
    )


def _products(subject: Subject) -> tuple[Decision, ...]:
    value, reason = _gemm(subject)
    fast = subject.settings.build.fast
    return (
        Decision("gemm_plugin", value, reason),
        Decision("use_fused_mlp", True, "gate and up are one product"),
        Decision(
            "moe_plugin",
            "auto" if subject.experts else None,
            "the experts' kernels" if subject.experts else "the model has no experts",
        ),
        Decision("manage_weights", fast, "engine.build.fast" if fast else "weights are part of the engine files"),
        _left("low_latency_gemm_plugin", "for batches of four and fewer in FP8; slower beyond"),
        _left("low_latency_gemm_swiglu_plugin", "the same"),
        _left("gemm_swiglu_plugin", "Hopper in FP8 alone, and less exact: it has one scale for both halves"),
        _left("gemm_allreduce_plugin", "needs NVSwitch multicast"),
    )


def _gemm(subject: Subject) -> tuple[str | None, str]:
    asked = subject.settings.build.gemm_plugin
    if asked is not None:
        return asked, "engine.build.gemm_plugin says so"
    match subject.algorithm:
        case "FP8":
            return None, "TensorRT's own FP8 products are faster from middle batches on"
        case "NVFP4":
            return "nvfp4", "the builder sets it for NVFP4"
        case None | "W4A16_AWQ":
            return "auto", "cuBLAS is faster and builds sooner for 16-bit products"
        case _:
            return None, "quantized products have kernels of their own"


def _ranks(subject: Subject) -> tuple[Decision, ...]:
    several = subject.layout.world_size > 1
    return (
        Decision("nccl_plugin", "auto" if several else None, "ranks talk" if several else "there is one rank"),
        Decision("reduce_fusion", False, "changes the order of sums, and is not known for all models"),
        Decision("user_buffer", False, "needs reduce_fusion"),
        Decision("pp_reduce_scatter", False, "pays for large models of experts over slow links only"),
    )


def _plugins_by_library() -> tuple[Decision, ...]:
    reason = "the builder sets it if the quantization needs it"
    names = (
        "weight_only_groupwise_quant_matmul_plugin", "weight_only_quant_matmul_plugin", "smooth_quant_gemm_plugin",
        "smooth_quant_plugins", "layernorm_quantization_plugin", "rmsnorm_quantization_plugin",
        "quantize_per_token_plugin", "quantize_tensor_plugin", "fp8_rowwise_gemm_plugin", "qserve_gemm_plugin",
        "norm_quant_fusion", "fuse_fp4_quant",
    )  # fmt: skip
    return tuple(_left(name, reason) for name in names)


def _plugins_unused() -> tuple[Decision, ...]:
    return (
        _left("bert_attention_plugin", "the model has no encoder"),
        _left("bert_context_fmha_fp32_acc", "the model has no encoder"),
        _left("identity_plugin", "for debugging"),
        _left("lora_plugin", "requests cannot name an adapter"),
        _left("dora_plugin", "requests cannot name an adapter"),
        _left("mamba_conv1d_plugin", "for state-space models, which the builder knows"),
        _left("paged_state", "for state-space models, which the builder knows"),
    )
