"""TrtllmSettings: what an operator can choose about the `trtllm` engine. Imports no GPU library.

Every setting reaches the constructor call (`arguments.py`), the run time (`engine.py`) or a launcher, on both lines
of TensorRT-LLM, or is refused with a remedy (`support.py`); tests/unit/engines/trtllm/test_arguments_exhaustive.py
walks all of them.
"""

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from serve.core.strict_model import StrictModel
from serve.engines.trtllm.line import Backend
from serve.engines.trtllm.orchestration import DECIDED_HERE
from serve.engines.trtllm.settings_cache import KvCacheSettings, KvConnectorSettings, KvTransferSettings
from serve.engines.trtllm.settings_execution import (
    AttentionDpSettings,
    BatchWaitSettings,
    CudaGraphSettings,
    EngineBuildSettings,
    LoraSettings,
    MoeSettings,
    QuantizationSettings,
    SchedulerSettings,
    TorchCompileSettings,
)
from serve.engines.trtllm.settings_speculation import SpeculationSettings
from serve.engines.trtllm.support import unsupported


class StatsSettings(StrictModel):
    """What the engine tells about its steps."""

    interval_s: PositiveFloat = Field(default=0.25, description="How often statistics are read.")
    queue: PositiveInt = Field(default=1000, description="Steps whose statistics are kept until they are read.")
    step_log: bool = Field(default=False, description="A log line for each step. PyTorch backend only.")
    requests: bool = Field(default=False, description="Statistics of each request in each step; costs CPU time.")
    timings: bool = Field(default=False, description="Measure queue, prefill and transfer times of each request.")


class TrtllmSettings(StrictModel):
    """TensorRT-LLM, 1.2.x or the newest line, on NVIDIA GPUs."""

    kind: Literal["trtllm"] = "trtllm"
    backend: Literal["auto", "pytorch", "tensorrt"] = Field(
        default="auto",
        description="tensorrt: compiled engines, 1.2.x only. auto: tensorrt for a directory that holds an engine or a "
        "TensorRT-LLM checkpoint, pytorch for a Hugging Face checkpoint.",
    )
    orchestrator: Literal["auto", "in_process", "mpi", "ray"] = Field(
        default="auto",
        description="Who starts the ranks. auto: in_process for one GPU; on one node mpi where MPI can start "
        "processes, else ray; on several nodes ray.",
    )
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        default="auto", description="Type of weights and activations; auto: as the checkpoint says."
    )
    load_format: Literal["auto", "dummy"] = Field(
        default="auto", description="dummy: random weights, to measure without reading any."
    )
    checkpoint_format: str | None = Field(
        default=None, description="HF, mistral, or MX (peer-to-peer loading, newest line); None: HF. PyTorch only."
    )
    checkpoint_io: Literal["auto", "native", "rank_striped_read_ahead"] = Field(
        default="auto", description="How weight files are read; newest line only."
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with the checkpoint.")
    model_overrides: dict[str, Any] = Field(
        default={}, description="Values that replace those of the checkpoint's config.json; newest line only."
    )

    max_batch_size: PositiveInt | None = Field(
        default=None, description="Sequences that are computed together; None: the library's or the built engine's."
    )
    max_num_tokens: PositiveInt | None = Field(
        default=None, description="Tokens of one step; None: 8,192, or the built engine's."
    )
    context_tokens: PositiveInt | None = Field(
        default=None, description="Cap on prompt and output together; None: the model's, or the built engine's."
    )
    max_waiting: NonNegativeInt = Field(
        default=256, description="Sequences that may wait for a place in the batch; more are refused with a 429/503."
    )
    chunked_prefill: bool = Field(
        default=True,
        description="Compute long prompts in several steps. False: prompts longer than `max_num_tokens` are refused.",
    )
    overlap_scheduler: bool = Field(
        default=True, description="Prepare the next step while this one is computed. PyTorch backend only."
    )
    scheduler: SchedulerSettings = SchedulerSettings()
    batch_wait: BatchWaitSettings = BatchWaitSettings()
    kv_cache: KvCacheSettings = KvCacheSettings()
    kv_transfer: KvTransferSettings | None = Field(
        default=None,
        description="Makes the engine able to hand prompts' KV to another; requests cannot be split in this release.",
    )
    kv_connector: KvConnectorSettings | None = Field(default=None, description="None: no connector.")

    cuda_graphs: CudaGraphSettings = CudaGraphSettings()
    torch_compile: TorchCompileSettings | None = Field(default=None, description="None: not used.")
    autotuner: bool = Field(
        default=True, description="Measure kernels at the start; false starts sooner and runs slower. PyTorch only."
    )
    attention_backend: Literal["TRTLLM", "FLASHINFER", "VANILLA"] = Field(
        default="TRTLLM", description="Attention kernels. PyTorch backend only."
    )
    allreduce: Literal[
        "AUTO", "NCCL", "UB", "MINLATENCY", "ONESHOT", "TWOSHOT", "LOWPRECISION", "MNNVL", "NCCL_SYMMETRIC"
    ] = Field(
        default="AUTO",
        description="How tensor ranks add up their results; try NCCL where GPUs have no NVLink. PyTorch backend only.",
    )
    sampler: Literal["auto", "trtllm", "torch"] = Field(
        default="auto", description="Implementation of sampling; other than auto: 1.2.x, PyTorch backend only."
    )
    nvfp4_gemm: tuple[Literal["cutlass", "cublaslt", "cuda_core", "cutedsl"], ...] = Field(
        default=(), description="Kernels that NVFP4 matrix products may use; (): the library's. PyTorch backend only."
    )
    min_latency: bool = Field(default=False, description="Kernels for a batch of very few. PyTorch backend only.")
    dynamic_quantization: bool = Field(
        default=False, description="Quantize at load time where a method supports it. PyTorch backend only."
    )
    moe: MoeSettings = MoeSettings()
    attention_dp: AttentionDpSettings = AttentionDpSettings()
    pipeline_layers: tuple[PositiveInt, ...] = Field(
        default=(), description="Layers of each pipeline stage; (): as equal as possible."
    )
    stream_interval_tokens: PositiveInt = Field(
        default=1, description="Tokens of a sequence that are streamed together. PyTorch backend only."
    )
    postprocess_workers: NonNegativeInt = Field(
        default=0, description="Processes that take responses apart; not with the ray orchestrator."
    )
    gc_threshold: PositiveInt = Field(
        default=20000, description="Python objects between two garbage collections. PyTorch backend only."
    )

    speculation: SpeculationSettings | None = Field(default=None, description="None: no speculative decoding.")
    guided_decoding: Literal["xgrammar", "llguidance"] | None = Field(
        default=None,
        description="Makes the engine able to follow grammars; requests cannot ask for structure in this release.",
    )
    lora: LoraSettings | None = Field(
        default=None,
        description="Makes the engine able to use adapters; requests cannot name one in this release.",
    )
    quantization: QuantizationSettings | None = Field(default=None, description="None: as the checkpoint says.")
    build: EngineBuildSettings = EngineBuildSettings()
    sleep: bool = Field(default=False, description="Let weights and KV cache be given back while idle. PyTorch only.")

    stats: StatsSettings = StatsSettings()
    telemetry: bool = Field(default=False, description="Let the newest line report its usage to NVIDIA.")
    environment: dict[str, str] = Field(
        default={}, description="Environment variables, set before TensorRT-LLM is imported and given to its ranks."
    )
    start_timeout_s: PositiveFloat = Field(
        default=1800.0, description="Loading, tuning and graph capture may take this long."
    )
    stop_timeout_s: PositiveFloat = Field(default=20.0, description="Shutting down; then the ranks are killed.")
    extra: dict[str, Any] = Field(
        default={},
        description="Further keywords of the LLM constructor, by TensorRT-LLM's own names; nested configs as "
        "dictionaries. Checked against the line's signature.",
    )

    @model_validator(mode="after")
    def _backend_has_all_settings(self) -> Self:
        if self.backend != "auto":
            mistakes = unsupported(self, None, Backend(self.backend))
            if mistakes:
                raise ValueError("; ".join(mistakes))
        if self.backend == "tensorrt" and self.orchestrator == "ray":
            raise ValueError(
                "orchestrator 'ray' runs the PyTorch backend only; use orchestrator: mpi, or backend: pytorch"
            )
        return self

    @model_validator(mode="after")
    def _postprocessing_fits_orchestrator(self) -> Self:
        if self.postprocess_workers and self.orchestrator == "ray":
            raise ValueError(
                f"postprocess_workers={self.postprocess_workers} does not work with orchestrator 'ray'; use 0, or "
                "orchestrator: mpi"
            )
        return self

    @model_validator(mode="after")
    def _batch_fits_step(self) -> Self:
        graphs = self.cuda_graphs
        largest = graphs.max_batch_size or max(graphs.batch_sizes, default=0)
        if self.max_batch_size is not None and largest > self.max_batch_size:
            raise ValueError(
                f"cuda_graphs record batches of {largest}, but max_batch_size={self.max_batch_size}; lower the former"
            )
        if None not in (self.max_batch_size, self.max_num_tokens) and self.max_num_tokens < self.max_batch_size:  # type: ignore[operator]
            raise ValueError(
                f"max_num_tokens={self.max_num_tokens} is less than max_batch_size={self.max_batch_size}: a step would "
                "not hold one token of each sequence; lower max_batch_size"
            )
        return self

    @model_validator(mode="after")
    def _reserved_names(self) -> Self:
        reserved = sorted(
            name for name in self.environment if name.startswith(("RAYTRT_", "RAY_")) or name in DECIDED_HERE
        )
        if reserved:
            raise ValueError(f"environment: {', '.join(reserved)} belong to Ray and to the orchestrator; remove them")
        return self

    @property
    def further_checkpoints(self) -> tuple[str, ...]:
        """Directories besides the model's own that every rank reads."""
        draft = getattr(self.speculation, "model", None)
        adapters = self.lora.preload if self.lora is not None else ()
        return (*((draft,) if draft is not None else ()), *adapters)
