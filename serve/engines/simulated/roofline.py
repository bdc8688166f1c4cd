"""RooflineLatency: duration of a step from the model's shape and the GPU's datasheet.

A step is the matrix products of all tokens, bound by the tensor cores or by reading the weights, whichever takes
longer; the attention of prompts, bound by the tensor cores; the attention of decoding sequences, bound by reading their
keys and values; the all-reduces of tensor parallelism; and what a step costs whatever is in it. Seven constants, the
same for all models, precisions and layouts of a GPU generation, stand between datasheet and reality;
`benchmarks/latency_model.py` fits them to published figures of TensorRT-LLM, and shows how far they carry.

With p pipeline stages a step is one round, in which every sequence passes all stages, in p groups of equal size that
keep all stages busy: products and attention go p times as fast, but each group reads the weights again, so that reading
them takes as long as in one stage; and each group has the costs that a step has whatever is in it.

Source of the form: Williams, Waterman, Patterson, "Roofline: an insightful visual performance model", 2009; FLOPs per
token as in Narayanan et al., "Efficient large-scale language model training on GPU clusters", 2021, forward pass only.
"""

import math
from typing import NamedTuple

from pydantic import Field, NonNegativeFloat, PositiveFloat

from serve.core.strict_model import StrictModel
from serve.engines.simulated.hardware import BYTES_PER_WEIGHT, Generation, GpuDatasheet
from serve.engines.simulated.latency import StepShape
from serve.engines.simulated.model_shape import ModelShape
from serve.engines.simulated.split import Precisions, Split

_BETWEEN_NODES_GB_PER_S = 25.0  # one way, for each GPU: 200 Gb/s, what clusters for inference usually have
_HOP_S = 2e-5  # latency of handing activations to the next pipeline stage


class Efficiency(StrictModel):
    """What of the datasheet is reached, and what a step costs beside. The defaults were fitted on Hopper GPUs."""

    compute: PositiveFloat = Field(default=0.55, le=1, description="Share of the tensor rate in matrix products.")
    attention: PositiveFloat = Field(default=0.66, le=1, description="Share of the 16-bit tensor rate in attention.")
    memory: PositiveFloat = Field(default=0.88, le=1, description="Share of the memory bandwidth.")
    link: PositiveFloat = Field(default=0.67, le=1, description="Share of the link bandwidth in all-reduces.")
    step_overhead_s: NonNegativeFloat = Field(default=1.4e-3, description="Host and launch time of each step.")
    sequence_overhead_s: NonNegativeFloat = Field(default=3.7e-6, description="Host and sampling time of a sequence.")
    all_reduce_s: NonNegativeFloat = Field(default=3.6e-5, description="Latency of one all-reduce.")
    experts: PositiveFloat = Field(
        default=0.22, le=1, description="Share of `compute` in the products of experts, which are many and small."
    )
    stage_loss: NonNegativeFloat = Field(
        default=0.035, description="Share of a pipeline's time that is lost with each stage after the first."
    )


# Fitted to 60 figures of dense FP8 models on H100 and H200 (root mean square error 8 %), to 20 of dense FP4 models on
# B200 (5 %), to 116 of dense and MoE models on RTX PRO 6000, in 1 to 8 pipeline stages (11 %); `experts` to MoE models
# on the others (30 %). Ampere and Ada: to the old tables of release 0.6.1, as far as these tell (9 % and 6 %).
# `benchmarks/plan_facts.py` shows them. The CPU: one core of a current server, by benchmarks/results of the
# transformers engine and the quickstart model; a rough guide.
EFFICIENCIES: dict[Generation, Efficiency] = {
    "ampere": Efficiency(compute=0.73, memory=0.85, step_overhead_s=2.5e-3),
    "ada": Efficiency(compute=0.52, memory=0.79, step_overhead_s=2.5e-3),
    "hopper": Efficiency(),
    "blackwell": Efficiency(
        compute=0.43,
        attention=0.56,
        memory=0.65,
        link=0.69,
        step_overhead_s=3.9e-3,
        sequence_overhead_s=1.4e-5,
        all_reduce_s=3.6e-5,
        experts=0.4,
    ),
    "rtx_blackwell": Efficiency(
        compute=0.59,
        attention=0.68,
        memory=0.79,
        link=0.49,
        step_overhead_s=3.5e-3,
        sequence_overhead_s=1.45e-5,
        all_reduce_s=7.4e-5,
        experts=0.46,
    ),
    "cpu": Efficiency(
        compute=0.5, attention=0.8, memory=0.7, step_overhead_s=9e-3, sequence_overhead_s=5e-4, experts=0.5
    ),
}


class StepParts(NamedTuple):
    """What a step without prompts takes, in s: `weights_s` or `products_s`, whichever is more, and the others."""

    weights_s: float
    keys_s: float
    products_s: float
    fixed_s: float


class RooflineLatency:
    """Step times of one model on the GPUs of one engine.

    Args:
        shape: The model.
        gpu: Each of the GPUs.
        split: How the model is cut into ranks.
        precisions: Of weights, keys and values.
        efficiency: How well the hardware is used.
    """

    def __init__(
        self, shape: ModelShape, gpu: GpuDatasheet, split: Split, precisions: Precisions, efficiency: Efficiency
    ) -> None:
        self._shape, self._split = shape, split
        tensor = split.tensor
        self._bandwidth = gpu.memory_gb_per_s * 1e9 * efficiency.memory * tensor
        compute = 1e12 * efficiency.compute * tensor
        rate, attention_rate = gpu.tflops(precisions.weights) * compute, gpu.tflops(precisions.of_attention) * compute
        self._stages = split.pipeline
        self._lengthened = 1.0 + efficiency.stage_loss * (split.pipeline - 1)
        self._set_products(rate, attention_rate, efficiency.experts, precisions)
        self._head_s = 2 * shape.head_weights / (gpu.bf16_tflops * compute)
        self._head_read_s = 2 * shape.head_weights / self._bandwidth * self._stages
        self._set_attention(gpu.bf16_tflops * 1e12 * efficiency.attention * tensor, precisions)
        self._step_s = efficiency.step_overhead_s * self._stages
        self._sequence_s = efficiency.sequence_overhead_s
        self._moved_token_s = 0.0
        self._set_links(gpu, efficiency)
        if split.attention_dp:  # every rank has all of these, and reads them for its own sequences
            self._attention_read_s *= tensor
            self._head_read_s *= tensor
            self._sequence_s /= tensor

    def step_s(self, shape: StepShape) -> float:
        tokens = shape.prefill_tokens + shape.decode_sequences
        outputs = shape.prefill_ends + shape.decode_sequences
        head_s = max(outputs * self._head_s, self._head_read_s) if outputs else 0.0
        return self._lengthened * (
            self._step_s
            + self._products_s(tokens)
            + head_s
            + shape.prefill_pairs * self._pair_s
            + shape.decode_context_tokens * self._kv_token_s
            + (self._windows_s(shape) if self._shape.windowed_layers else 0.0)
            + tokens * self._moved_token_s
            + outputs * self._sequence_s
        )

    def parts(self, sequences: float, context_tokens: float) -> StepParts:
        """Return what a step without prompts is made of, for sequences of a mean context."""
        tokens = int(sequences)
        read_s = self._attention_read_s + self._dense_read_s + self._head_read_s
        if self._expert_read_s:
            read_s += self._expert_read_s * self._experts_read(tokens / self._stages) * self._crowding(tokens)
        shape = StepShape(decode_sequences=tokens, decode_context_tokens=int(sequences * context_tokens))
        keys_s = shape.decode_context_tokens * self._kv_token_s + self._windows_s(shape)
        crowding = self._crowding(tokens) if self._expert_token_s else 1.0
        products_s = tokens * (self._dense_token_s + self._expert_token_s * crowding + self._head_s)
        fixed_s = self._step_s + tokens * (self._moved_token_s + self._sequence_s)
        return StepParts(*(part * self._lengthened for part in (read_s, keys_s, products_s, fixed_s)))

    @property
    def stages(self) -> int:
        """Pipeline stages: a prompt passes them one after the other, so its own time is so many times its share."""
        return self._stages

    # Matrix products

    def _set_products(self, rate: float, attention_rate: float, expert_share: float, precisions: Precisions) -> None:
        shape, stages = self._shape, self._stages
        dense = (shape.layers - shape.moe_layers) * shape.dense_weights + shape.moe_layers * shape.shared_weights
        experts = shape.moe_layers * shape.expert_weights
        read_s = BYTES_PER_WEIGHT[precisions.weights] / self._bandwidth
        attention_read_s = BYTES_PER_WEIGHT[precisions.of_attention] / self._bandwidth
        self._dense_token_s = 2 * (shape.layers * shape.attention_weights / attention_rate + dense / rate) / stages
        self._expert_token_s = 2 * shape.experts_per_token * experts / (rate * expert_share) / stages
        self._attention_read_s = shape.layers * shape.attention_weights * attention_read_s
        self._dense_read_s = dense * read_s
        self._expert_read_s = experts * read_s

    def _products_s(self, tokens: int) -> float:
        if not self._expert_read_s:
            return max(tokens * self._dense_token_s, self._attention_read_s + self._dense_read_s)
        crowding = self._crowding(tokens)
        return max(
            tokens * (self._dense_token_s + self._expert_token_s * crowding),
            self._attention_read_s
            + self._dense_read_s
            + self._expert_read_s * self._experts_read(tokens / self._stages) * crowding,
        )

    def _experts_read(self, tokens: float) -> float:
        """Return how many experts of a layer some token visits, if each token's experts were drawn at random."""
        missed: float = (1.0 - self._shape.experts_per_token / self._shape.experts) ** tokens
        return self._shape.experts * (1.0 - missed)

    def _crowding(self, tokens: int) -> float:
        """Return how much more the fullest rank has to do than the mean, if ranks hold whole experts.

        A rank's share of the visits is binomial; the largest of n such shares exceeds the mean m by about
        sqrt(2 m ln n). Source: Raab, Steger, "Balls into bins - a simple and tight analysis", 1998.
        """
        ranks = self._split.experts_apart
        visits = tokens * self._shape.experts_per_token / ranks
        if ranks == 1 or not visits:
            return 1.0
        return min(float(ranks), 1.0 + math.sqrt(2.0 * math.log(ranks) / visits))

    # Attention

    def _set_attention(self, rate: float, precisions: Precisions) -> None:
        shape, stages = self._shape, self._stages
        pair_s = 2 * shape.heads * (shape.head_dim + shape.values) / rate
        kv_bytes = shape.kv_numbers * BYTES_PER_WEIGHT[precisions.kv_cache]
        kv_s = kv_bytes / self._bandwidth * self._split.kv_copies(shape)
        if shape.latent is not None:  # heads meet the compressed vector itself, which makes them compute-bound
            kv_s = max(kv_s, 2 * shape.heads * (2 * shape.latent.kv_rank + shape.latent.rope_dim) / rate)
        full = shape.layers - shape.windowed_layers
        self._pair_s, self._kv_token_s = full * pair_s / stages, full * kv_s / stages
        self._window_pair_s = shape.windowed_layers * pair_s / stages
        self._window_kv_s = shape.windowed_layers * kv_s / stages

    def _windows_s(self, shape: StepShape) -> float:
        """Return the time of layers with a window: no token has to do with more others than it holds."""
        window = self._shape.window_tokens or 0
        pairs = min(shape.prefill_pairs, float(shape.prefill_tokens * window))
        kept = min(shape.decode_context_tokens, shape.decode_sequences * window)
        return pairs * self._window_pair_s + kept * self._window_kv_s

    # Communication

    def _set_links(self, gpu: GpuDatasheet, efficiency: Efficiency) -> None:
        shape, split = self._shape, self._split
        tensor, stages = split.tensor, self._stages
        activation = 2 * shape.hidden  # of one token, 16 bits
        if tensor > 1:
            # After attention and after the feed-forward network; if attention is not split, around the latter only.
            reduces = shape.layers if split.attention_dp else 2 * shape.layers
            self._step_s += reduces * efficiency.all_reduce_s
            moved = 2 * (tensor - 1) / tensor * activation  # of a ring
            self._moved_token_s = reduces * moved / (gpu.link_gb_per_s * 1e9 * efficiency.link) / stages
        if stages > 1:
            link = gpu.link_gb_per_s * efficiency.link if split.world_size <= gpu.node_gpus else _BETWEEN_NODES_GB_PER_S
            self._step_s += stages * _HOP_S
            self._moved_token_s += activation / (link * 1e9)


def kv_capacity_tokens(
    shape: ModelShape,
    gpu: GpuDatasheet,
    split: Split,
    precisions: Precisions,
    free_fraction: float,
    reserved_gb: float,
) -> int:
    """Return how many tokens' keys and values fit beside the weights.

    The cache takes `free_fraction` of the memory that is free after loading, as TensorRT-LLM's
    `free_gpu_memory_fraction` does; CUDA, NCCL, activations and graphs take `reserved_gb` (1e9 bytes) of each GPU.
    """
    tokens = []
    for stage in range(split.pipeline):
        free_bytes = (gpu.memory_gb - reserved_gb) * 1e9 - split.weight_bytes(shape, precisions, stage).total
        tokens.append(free_bytes * free_fraction / split.kv_bytes_per_token(shape, precisions.kv_cache, stage))
    return max(0, int(min(tokens) * (split.tensor if split.attention_dp else 1)))
