"""Settings of how a TensorRT-LLM engine computes: scheduling, CUDA graphs, compilation, experts, adapters."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from serve.core.strict_model import StrictModel
from serve.engines.trtllm.settings_cache import PeftCacheSettings


class DynamicBatchSettings(StrictModel):
    """Let the scheduler tune its own limits. TensorRT backend (1.2.x) only."""

    batch_size: bool = Field(default=True, description="Tune the number of sequences in the batch.")
    num_tokens: bool = Field(default=False, description="Tune the number of tokens in a step.")
    window: PositiveInt = Field(default=128, description="Steps over which the load is averaged.")


class SchedulerSettings(StrictModel):
    """Which sequences enter the batch, and in which order."""

    capacity: Literal["guaranteed_no_evict", "max_utilization", "static_batch"] = Field(
        default="guaranteed_no_evict",
        description="guaranteed_no_evict: a sequence enters when its longest output fits; max_utilization: when the "
        "next step fits, and may be paused later; static_batch: no sequence enters a running batch.",
    )
    context_chunking: Literal["first_come_first_served", "equal_progress"] | None = Field(
        default=None, description="How chunks of several long prompts share a step; None: the library's choice."
    )
    waiting_order: Literal["fcfs", "priority"] = Field(
        default="fcfs", description="Order of waiting requests. priority: newest line only."
    )
    dynamic_batch: DynamicBatchSettings | None = Field(default=None, description="None: limits stay as they are.")


class BatchWaitSettings(StrictModel):
    """Hold a small batch back for a moment, so that more sequences share a step. PyTorch backend only."""

    timeout_s: NonNegativeFloat = Field(default=0.0, description="How long new requests wait for others; 0: not.")
    steps: NonNegativeInt = Field(default=0, description="How many steps prompts wait for a fuller batch; 0: none.")
    token_ratio: NonNegativeFloat = Field(
        default=0.0, le=1, description="Share of `max_num_tokens` at which a batch is full enough; 0: no waiting."
    )


class CudaGraphSettings(StrictModel):
    """Decode steps recorded as CUDA graphs: less CPU time a step, more memory and a longer start. PyTorch backend."""

    enabled: bool = Field(default=True, description="False: every step is launched kernel by kernel.")
    batch_sizes: tuple[PositiveInt, ...] = Field(
        default=(), description="Batch sizes that are recorded; (): a list up to `max_batch_size`."
    )
    max_batch_size: PositiveInt | None = Field(
        default=None, description="Largest batch that is recorded; None: the largest of `batch_sizes`, or 128."
    )
    padding: bool = Field(default=True, description="Run a batch of another size in the next larger recorded one.")

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if not self.enabled and (self.batch_sizes or self.max_batch_size is not None):
            raise ValueError("enabled=False records nothing; remove batch_sizes and max_batch_size")
        if self.batch_sizes and self.max_batch_size not in (None, max(self.batch_sizes)):
            raise ValueError(
                f"max_batch_size={self.max_batch_size} is not the largest of batch_sizes={list(self.batch_sizes)}; "
                "remove one of the two"
            )
        return self


class TorchCompileSettings(StrictModel):
    """torch.compile. PyTorch backend only."""

    full_graph: bool = Field(default=True, description="Compile the model as one graph.")
    inductor: bool = Field(default=False, description="Generate kernels with Inductor.")
    piecewise_cuda_graphs: bool = Field(default=False, description="Record prefill steps too, around attention.")
    capture_num_tokens: tuple[PositiveInt, ...] = Field(
        default=(), description="Prefill sizes that are recorded; (): the library's choice."
    )
    user_buffers: bool = Field(default=True, description="Let all-reduce use registered buffers.")
    max_streams: PositiveInt = Field(default=1, description="CUDA streams.")


class MoeSettings(StrictModel):
    """Mixture of experts. How experts are spread over GPUs is `parallel.expert`. PyTorch backend only."""

    backend: str | None = Field(
        default=None, description="Kernels: CUTLASS, TRTLLM, DEEPGEMM, WIDEEP, ...; None: the library's choice."
    )
    max_num_tokens: PositiveInt | None = Field(default=None, description="Tokens that are given to experts at once.")
    load_balancer: str | None = Field(default=None, description="File of an expert placement; None: no balancing.")
    finalize_fusion: bool = Field(default=True, description="Fuse the last step of the expert kernels.")
    low_precision_combine: bool = Field(default=False, description="Combine the experts' outputs in low precision.")


class AttentionDpSettings(StrictModel):
    """Attention data parallelism: each tensor rank computes the attention of its own requests. PyTorch backend."""

    enabled: bool = Field(default=False, description="False: attention heads are split over the tensor ranks.")
    balance: bool = Field(default=False, description="Hold prompts back until ranks have equal work.")
    balance_steps: NonNegativeInt = Field(default=50, description="At most this many steps.")
    batching_steps: NonNegativeInt = Field(default=10, description="Steps that wait for a fuller batch of prompts.")
    tensor_parallel_head: bool = Field(default=False, description="Split the last layer over the tensor ranks anyway.")

    @model_validator(mode="after")
    def _details_need_it(self) -> Self:
        details = sorted(self.model_fields_set - {"enabled"})
        if not self.enabled and details:
            raise ValueError(f"{', '.join(details)} need attention_dp.enabled: true; set it, or remove them")
        return self


class LoraSettings(StrictModel):
    """LoRA adapters that requests may name."""

    max_rank: PositiveInt = Field(default=64, description="Largest rank of an adapter.")
    target_modules: tuple[str, ...] = Field(
        min_length=1, description="Modules that adapters change, for instance attn_q, attn_k, attn_v, attn_dense."
    )
    max_loaded: PositiveInt | None = Field(default=None, description="Adapters on the GPU; None: as memory allows.")
    max_cached: PositiveInt | None = Field(default=None, description="Adapters in main memory; None: as it allows.")
    source: Literal["hf", "nemo"] = Field(default="hf", description="Format of the adapters.")
    preload: tuple[str, ...] = Field(default=(), description="Directories of adapters that are loaded at the start.")
    cache: PeftCacheSettings | None = Field(
        default=None, description="Memory for adapters; None: the library's choice."
    )


class CalibrationSettings(StrictModel):
    """Data that quantization is calibrated with."""

    dataset: str = Field(default="cnn_dailymail", description="Path of a dataset, or a name that is downloaded.")
    batches: PositiveInt = Field(default=512, description="Batches that are run.")
    batch_size: PositiveInt = Field(default=1, description="Samples of a batch.")
    max_sequence_tokens: PositiveInt = Field(default=512, description="Longer samples are cut.")
    seed: int = Field(default=1234, description="Of the random choice of samples.")
    device: Literal["cuda", "cpu"] = Field(default="cuda", description="Where calibration runs.")


class QuantizationSettings(StrictModel):
    """Quantize while an engine is built. TensorRT backend (1.2.x) only: PyTorch reads it from the checkpoint."""

    algorithm: str | None = Field(default=None, description="FP8, W4A16_AWQ, W8A8_SQ_PER_CHANNEL, NVFP4, ...")
    kv_cache_algorithm: Literal["FP8", "INT8", "NVFP4"] | None = Field(default=None, description="Of keys and values.")
    group_size: PositiveInt = Field(default=128, description="Weights that share a scale.")
    smoothquant: float = Field(default=0.5, ge=0, le=1, description="How much is moved from activations to weights.")
    exclude_modules: tuple[str, ...] = Field(default=(), description="Modules that stay as they are.")
    calibration: CalibrationSettings | None = Field(default=None, description="None: the library's default.")

    @model_validator(mode="after")
    def _something_is_quantized(self) -> Self:
        if self.algorithm is None and self.kv_cache_algorithm is None:
            raise ValueError("give algorithm, kv_cache_algorithm or both, or remove the section")
        return self


class EngineBuildSettings(StrictModel):
    """How the TensorRT backend (1.2.x) builds an engine from a checkpoint; an engine directory is already built."""

    max_input_tokens: PositiveInt | None = Field(
        default=None, description="Longest prompt; None: the library's choice."
    )
    opt_batch_size: PositiveInt | None = Field(default=None, description="Batch size that kernels are chosen for.")
    opt_num_tokens: PositiveInt | None = Field(default=None, description="Tokens of a step they are chosen for.")
    prompt_logprobs: bool = Field(default=False, description="Keep logits of prompts, which `prompt_logprobs` needs.")
    logprobs: bool = Field(default=False, description="Keep logits of the output, which `logprobs` needs.")
    gemm_plugin: Literal["auto", "float16", "float32", "bfloat16", "int32", "fp8", "nvfp4"] | None = Field(
        default=None, description="Kernels of matrix products; None: TensorRT's own."
    )
    fast: bool = Field(default=False, description="Build faster; the engine may be a little slower.")
    cache_directory: str | None = Field(
        default=None,
        description="Keep built engines here; one directory for each model of GPU, as the GPU is no part of the key.",
    )
    workspace_directory: str | None = Field(default=None, description="Parent of the temporary engine directory.")
