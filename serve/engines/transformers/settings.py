"""TransformersSettings: what an operator can choose about the `transformers` engine. Imports no GPU library."""

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from serve.core.strict_model import StrictModel


class TransformersSettings(StrictModel):
    """Hugging Face continuous batching on a CPU or one GPU, or on as many as `parallel.tensor` says: then, on each."""

    kind: Literal["transformers"] = "transformers"
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where the model runs; auto takes the first CUDA GPU of the process, else the CPU."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Type of weights, activations and KV cache; auto is float32 on a CPU, "
        "on a GPU the checkpoint's own 16-bit type or bfloat16.",
    )
    attention: Literal["auto", "paged", "sdpa", "eager", "flash_attention_2", "flash_attention_3"] = Field(
        default="auto",
        description="Attention kernels. paged: PyTorch's own kernels, one call for sequences of like length (models "
        "with full attention only); sdpa, eager: the library's masked attention over the whole batch, slow; "
        "flash_attention_*: needs the flash-attn package and a GPU. auto: the fastest that model and machine have.",
    )
    tokens_per_block: int = Field(
        default=32,
        ge=4,
        description="Size of a KV block, the unit of prefix reuse. flash_attention_2 on a GPU decodes "
        "fastest with 256.",
    )
    kv_cache_tokens: PositiveInt | None = Field(
        default=None,
        description="Size of the KV cache in tokens, rounded down to whole blocks. Default: what "
        "`kv_cache_fraction` yields, on a CPU at most 32,768 tokens or one full context, whichever is more.",
    )
    kv_cache_bytes: PositiveInt | None = Field(
        default=None, description="The same in bytes, of each tensor rank; excludes kv_cache_tokens."
    )
    kv_cache_fraction: float = Field(
        default=0.85,
        gt=0,
        le=1,
        description="Without an explicit size: share of the GPU memory that is free once the model is loaded; on a CPU "
        "a quarter of this share of the free main memory, which other replicas need too.",
    )
    prefix_sharing: bool = Field(default=True, description="Reuse the KV blocks of equal prompt prefixes.")
    max_batch_size: PositiveInt = Field(default=64, description="Sequences that are computed together, at most.")
    max_num_tokens: PositiveInt | None = Field(
        default=None,
        description="Tokens of one step, at most; longer prompts are computed in chunks between which "
        "other sequences advance. Default: 512 on a CPU, 4,096 on a GPU.",
    )
    max_waiting: NonNegativeInt = Field(
        default=256, description="Sequences that may wait for a place in the batch; more are refused with a 429/503."
    )
    context_tokens: PositiveInt | None = Field(
        default=None, description="Cap on prompt and output together; default: what the model's config says."
    )
    num_threads: PositiveInt | None = Field(
        default=None,
        description="CPU threads of each operation. Default: OMP_NUM_THREADS if it is set, one for a model of less "
        "than 100 million parameters, else all cores. Give each replica its share of the cores.",
    )
    warm_up: bool = Field(default=True, description="Run a few steps before the first request, so that it is not slow.")
    max_step_s: PositiveFloat = Field(
        default=300.0, description="A step that takes longer makes the engine unhealthy, and the replica is replaced."
    )
    stop_timeout_s: PositiveFloat = Field(
        default=15.0, description="How long stopping waits for the step that is being computed."
    )

    @model_validator(mode="after")
    def _one_cache_size(self) -> Self:
        if self.kv_cache_tokens is not None and self.kv_cache_bytes is not None:
            raise ValueError(
                f"kv_cache_tokens={self.kv_cache_tokens} and kv_cache_bytes={self.kv_cache_bytes} exclude each other; "
                "remove one of them"
            )
        if self.kv_cache_tokens is not None and self.kv_cache_tokens < 2 * self.tokens_per_block:
            raise ValueError(
                f"kv_cache_tokens={self.kv_cache_tokens} is less than two blocks of "
                f"tokens_per_block={self.tokens_per_block}; raise it, or lower tokens_per_block"
            )
        return self

    @model_validator(mode="after")
    def _step_has_room_for_prompts(self) -> Self:
        if self.max_num_tokens is not None and self.max_num_tokens <= self.max_batch_size:
            raise ValueError(
                f"max_num_tokens={self.max_num_tokens} must exceed max_batch_size={self.max_batch_size}: one token of "
                "each sequence would fill a step, and no prompt would ever be computed; lower max_batch_size"
            )
        return self

    @model_validator(mode="after")
    def _attention_fits_device(self) -> Self:
        if self.device == "cpu" and self.attention.startswith("flash_attention"):
            raise ValueError(f"attention={self.attention!r} needs a GPU, but device is 'cpu'; use 'auto' or 'paged'")
        return self
