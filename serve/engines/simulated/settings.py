"""SimulatedSettings: configuration of the simulated engine."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from serve.core.strict_model import StrictModel
from serve.engines.simulated.faults import Fault
from serve.engines.simulated.hardware import GPUS, GpuDatasheet, Precision
from serve.engines.simulated.known_models import MODELS
from serve.engines.simulated.latency import FixedLatency, LatencyModel
from serve.engines.simulated.limits import SchedulerLimits
from serve.engines.simulated.model_shape import ModelShape
from serve.engines.simulated.roofline import EFFICIENCIES, Efficiency, RooflineLatency, kv_capacity_tokens
from serve.engines.simulated.split import Precisions, Split
from serve.engines.simulated.tokens import LADDER


class FixedLatencySettings(StrictModel):
    """The same rates whatever is in the batch. The defaults take no time at all."""

    kind: Literal["fixed"] = "fixed"
    prefill_tokens_per_s: PositiveFloat | None = Field(default=None, description="None: prompts take no time.")
    decode_step_s: NonNegativeFloat = Field(default=0.0, description="One token of every sequence in the batch.")
    overhead_s: NonNegativeFloat = Field(default=0.0, description="Added to every step.")

    def make_model(self) -> LatencyModel:
        """Make the latency model."""
        return FixedLatency(self.prefill_tokens_per_s or math.inf, self.decode_step_s, self.overhead_s)


class RooflineSettings(StrictModel):
    """Rates from the model's shape and the GPU's datasheet."""

    kind: Literal["roofline"] = "roofline"
    model: str | ModelShape = Field(default="llama-3.1-8b", description=f"A shape, or one of {', '.join(MODELS)}.")
    gpu: str | GpuDatasheet = Field(default="h100", description=f"A datasheet, or one of {', '.join(GPUS)}.")
    tensor_parallel: PositiveInt = Field(default=1, description="GPUs that share each layer.")
    pipeline_parallel: PositiveInt = Field(default=1, description="Groups of layers, each on GPUs of its own.")
    expert_parallel: PositiveInt | None = Field(
        default=None, description="Over how many of the GPUs whole experts are spread; None: every expert is cut."
    )
    attention_dp: bool = Field(default=False, description="Attention data parallelism.")
    weights: Precision = Field(default="fp8", description="Precision of weights and matrix products.")
    attention_weights: Precision | None = Field(
        default=None, description="Of attention's matrices, where it is another one; None: as `weights`."
    )
    kv_cache: Precision = Field(default="fp8", description="Precision of keys and values.")
    efficiency: Efficiency | None = Field(
        default=None, description="What of the datasheet is reached. None: as calibrated for the GPU's generation."
    )
    kv_fraction: PositiveFloat = Field(
        default=0.9, le=1, description="Share of the memory left that the KV cache takes."
    )
    reserved_gb: NonNegativeFloat = Field(
        default=4.0, description="Memory of each GPU that the runtime takes, 1e9 bytes."
    )

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        if isinstance(self.model, str) and self.model not in MODELS:
            raise ValueError(f"model={self.model!r} is unknown: use one of {', '.join(MODELS)}, or give its shape")
        if isinstance(self.gpu, str) and self.gpu not in GPUS:
            raise ValueError(f"gpu={self.gpu!r} is unknown: use one of {', '.join(GPUS)}, or give its datasheet")
        if self.kv_capacity() < 1:
            raise ValueError(
                f"the weights do not fit on tensor_parallel={self.tensor_parallel} x {self.datasheet.name} "
                f"in {self.weights}: raise tensor_parallel, or take a smaller precision"
            )
        return self

    @property
    def shape(self) -> ModelShape:
        """The model."""
        return MODELS[self.model] if isinstance(self.model, str) else self.model

    @property
    def datasheet(self) -> GpuDatasheet:
        """The GPU."""
        return GPUS[self.gpu] if isinstance(self.gpu, str) else self.gpu

    @property
    def split(self) -> Split:
        """How the model is cut."""
        return Split(
            tensor=self.tensor_parallel,
            pipeline=self.pipeline_parallel,
            expert=self.expert_parallel,
            attention_dp=self.attention_dp,
        )

    @property
    def precisions(self) -> Precisions:
        """Of weights, keys and values."""
        return Precisions(weights=self.weights, attention=self.attention_weights, kv_cache=self.kv_cache)

    def kv_capacity(self) -> int:
        """Return how many tokens the KV cache holds."""
        return kv_capacity_tokens(
            self.shape, self.datasheet, self.split, self.precisions, self.kv_fraction, self.reserved_gb
        )

    def make_model(self) -> LatencyModel:
        """Make the latency model."""
        efficiency = self.efficiency or EFFICIENCIES[self.datasheet.generation]
        return RooflineLatency(self.shape, self.datasheet, self.split, self.precisions, efficiency)


LatencySettings = Annotated[FixedLatencySettings | RooflineSettings, Field(discriminator="kind")]


class SimulatedSettings(StrictModel):
    """An engine without a model: real scheduling and KV accounting, time from a latency model, tokens from a seed."""

    kind: Literal["simulated"] = "simulated"
    seed: int = Field(default=0, description="Another seed generates other tokens.")
    vocab_size: PositiveInt = Field(default=32000, description="Token ids are below this.")
    token_range: tuple[NonNegativeInt, NonNegativeInt] | None = Field(
        default=None,
        description="First and last id that is generated; leaves out special tokens. None: the vocabulary.",
    )
    stop_hazard: NonNegativeFloat = Field(
        default=0.0, le=1, description="Probability that a token is a stop token, if the request has any."
    )
    context_tokens: PositiveInt = Field(default=131072, description="Prompt and output of one sequence, together.")
    tokens_per_block: PositiveInt = Field(default=32, description="Size of a KV block.")
    total_blocks: PositiveInt | None = Field(
        default=None, description="KV blocks. None: what fits on the roofline's GPUs; with fixed rates 32768."
    )
    share_prefixes: bool = Field(default=True, description="Reuse the KV blocks of equal prefixes.")
    scheduling: Literal["guaranteed_no_evict", "max_utilization"] = Field(
        default="guaranteed_no_evict", description="TensorRT-LLM's capacity scheduler policies."
    )
    max_batch_size: PositiveInt = Field(default=256, description="Sequences in the batch.")
    max_num_tokens: PositiveInt = Field(default=8192, description="Tokens computed in one step.")
    chunked_prefill: bool = Field(default=True, description="Compute long prompts in several steps.")
    max_waiting: NonNegativeInt = Field(default=4096, description="Sequences that may wait; more are refused.")
    latency: LatencySettings = Field(default=RooflineSettings(), description="How long steps take.")
    speed: NonNegativeFloat = Field(default=1.0, description="2: twice as fast as the latency model says. 0: at once.")
    start_s: NonNegativeFloat = Field(default=0.0, description="How long the start takes.")
    max_logprobs: NonNegativeInt = Field(default=LADDER, le=LADDER, description="Largest logprobs accepted.")
    faults: tuple[Fault, ...] = Field(default=(), description="What goes wrong.")

    @model_validator(mode="after")
    def _ids_are_in_the_vocabulary(self) -> Self:
        first, last = self.generated_ids
        if last >= self.vocab_size or last - first + 1 < LADDER:
            raise ValueError(
                f"token_range={first, last} must hold {LADDER} ids or more, all below vocab_size={self.vocab_size}"
            )
        self.make_limits()  # for its errors
        return self

    @property
    def generated_ids(self) -> tuple[int, int]:
        """First and last id that is generated."""
        return self.token_range or (0, self.vocab_size - 1)

    def make_limits(self) -> SchedulerLimits:
        """Return what the scheduler has to keep within.

        Raises:
            ValueError: The sizes do not go together.
        """
        total_blocks = self.total_blocks
        if total_blocks is None:
            if isinstance(self.latency, FixedLatencySettings):
                total_blocks = 32768
            else:
                total_blocks = max(1, self.latency.kv_capacity() // self.tokens_per_block)
        return SchedulerLimits(
            total_blocks=total_blocks,
            tokens_per_block=self.tokens_per_block,
            max_batch_size=self.max_batch_size,
            max_num_tokens=self.max_num_tokens,
            chunked_prefill=self.chunked_prefill,
            guaranteed_no_evict=self.scheduling == "guaranteed_no_evict",
            share_prefixes=self.share_prefixes,
        )
