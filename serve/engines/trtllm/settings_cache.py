"""Settings of the KV cache of a TensorRT-LLM engine, and of its transfer between engines."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from serve.core.strict_model import StrictModel


class KvCacheSettings(StrictModel):
    """KV blocks on the GPU, in main memory and on disk, and the events that tell routers what they hold."""

    memory_fraction: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="Share of the GPU memory that is free once the model is loaded. Two engines on one GPU need "
        "`max_tokens` or `max_gpu_bytes` instead.",
    )
    max_tokens: PositiveInt | None = Field(default=None, description="Size of the KV cache in tokens, at most.")
    max_gpu_bytes: PositiveInt | None = Field(default=None, description="Size of the KV cache on each GPU, at most.")
    min_tokens: PositiveInt | None = Field(
        default=None,
        description="The start fails if fewer tokens fit: a GPU whose memory another process still holds gives a tiny "
        "KV cache, not an error.",
    )
    dtype: Literal["auto", "fp8", "nvfp4", "fp8_ds_mla"] = Field(
        default="auto", description="Precision of keys and values; auto: as the checkpoint says. nvfp4 and fp8_ds_mla: "
        "newest line only."
    )  # fmt: skip
    tokens_per_block: PositiveInt = Field(default=32, description="Size of a KV block, the unit of prefix reuse.")
    block_reuse: bool = Field(default=True, description="Reuse the KV blocks of equal prompt prefixes.")
    partial_reuse: bool = Field(default=True, description="Reuse a block of which only the first tokens are equal.")
    copy_on_partial_reuse: bool = Field(
        default=True, description="Copy a partly equal block that is in use, instead of computing it again."
    )
    host_bytes: NonNegativeInt = Field(
        default=0, description="Main memory for blocks that were pushed off the GPU; 0: none."
    )
    onboard_from_host: bool = Field(
        default=True, description="Bring such blocks back to the GPU before they are used. False: 1.2.x only."
    )
    offload_min_priority: int | None = Field(
        default=None,
        ge=0,
        le=100,
        description="Blocks of a lower retention priority are dropped, not pushed to the host.",
    )
    disk_bytes: NonNegativeInt = Field(default=0, description="Disk space for blocks; newest line only. 0: none.")
    disk_directory: str | None = Field(default=None, description="Where these blocks lie; needed with `disk_bytes`.")
    attention_windows: tuple[PositiveInt, ...] = Field(
        default=(), description="Attention window of each layer in tokens, repeated over the layers; (): the model's."
    )
    sink_tokens: PositiveInt | None = Field(
        default=None, description="First tokens of a sequence that stay visible when its attention window slides."
    )
    manager: Literal["auto", "v1", "v2"] = Field(
        default="auto", description="Implementation of the KV cache manager; newest line only."
    )
    mamba_dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        default="auto", description="Precision of the state of Mamba layers."
    )
    unified_memory: bool = Field(default=False, description="Let CUDA page the KV cache between GPU and main memory.")
    event_buffer: NonNegativeInt = Field(
        default=16384,
        description="KV events that the engine keeps until they are read; older ones are lost, and routers get a new "
        "snapshot. 0: no events, and no routing by prefix.",
    )
    event_interval_s: PositiveFloat = Field(default=0.05, description="How often KV events are read.")
    event_gather_s: PositiveFloat = Field(
        default=0.005,
        description="With attention data parallelism: how often rank 0 collects the events of the others.",
    )

    @model_validator(mode="after")
    def _disk_has_a_directory(self) -> Self:
        if bool(self.disk_bytes) != (self.disk_directory is not None):
            raise ValueError(
                f"disk_bytes={self.disk_bytes} and disk_directory={self.disk_directory!r} go together: give both, or "
                "remove both"
            )
        if self.disk_bytes and self.manager == "v1":
            raise ValueError("manager='v1' has no disk cache; use manager: auto or v2, or remove disk_bytes")
        return self

    @model_validator(mode="after")
    def _reuse_settings_fit(self) -> Self:
        if not self.block_reuse and "event_buffer" in self.model_fields_set and self.event_buffer:
            raise ValueError(
                f"event_buffer={self.event_buffer} needs block_reuse: true; events tell which blocks can be reused"
            )
        if self.min_tokens is not None and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}; lower min_tokens")
        return self


class KvTransferSettings(StrictModel):
    """Transfer of KV blocks between a prefill engine and a decode engine (disaggregated serving)."""

    backend: Literal["default", "ucx", "nixl", "mooncake", "mpi"] = Field(
        default="default", description="default: NIXL. With mpi, engines cannot join or leave while others run."
    )
    buffer_tokens: PositiveInt | None = Field(
        default=None,
        description="Size of the transfer buffer; at least the longest prompt. None: the library's choice.",
    )
    timeout_s: PositiveFloat | None = Field(
        default=None, description="Blocks that no decode engine fetched are freed after this time; None: never."
    )
    sender_timeout_s: PositiveFloat = Field(default=1.0, description="How long the sender waits for one transfer.")
    runtime: Literal["cpp", "python"] | None = Field(
        default=None, description="Implementation; newest line only. None: the library's choice."
    )


class KvConnectorSettings(StrictModel):
    """A KV cache connector: a Python class that stores blocks elsewhere. PyTorch backend only."""

    module: str = Field(min_length=1, description="Python module that holds the two classes.")
    scheduler_class: str = Field(min_length=1, description="Name of its scheduler class.")
    worker_class: str = Field(min_length=1, description="Name of its worker class.")


class PeftCacheSettings(StrictModel):
    """Memory for LoRA adapters."""

    host_bytes: PositiveInt = Field(default=1 << 30, description="Main memory for adapters.")
    device_fraction: NonNegativeFloat = Field(
        default=0.02, le=1, description="Share of the free GPU memory for adapters."
    )
    optimal_rank: PositiveInt = Field(default=8, description="Adapter rank that the page size is made for.")
    max_rank: PositiveInt = Field(default=64, description="Largest adapter rank.")
