"""RooflineLatency: duration of a step from the model's shape and the GPU's datasheet.

A step is the matrix products of all tokens, bound by the tensor cores or by reading the weights, whichever takes
longer; the attention of prompts, bound by the tensor cores; the attention of decoding sequences, bound by reading their
keys and values; the all-reduces of tensor parallelism; and what a step costs whatever is in it. Seven constants, the
same for all models, precisions and layouts of a GPU generation, stand between datasheet and reality;
`benchmarks/latency_model.py` fits them to published figures of TensorRT-LLM, and shows how far they carry.

Source of the form: Williams, Waterman, Patterson, "Roofline: an insightful visual performance model", 2009; FLOPs per
token as in Narayanan et al., "Efficient large-scale language model training on GPU clusters", 2021, forward pass only.
"""

from pydantic import Field, NonNegativeFloat, PositiveFloat

from serve.core.strict_model import StrictModel
from serve.engines.simulated.hardware import BYTES_PER_WEIGHT, Generation, GpuDatasheet, ModelShape, Precision
from serve.engines.simulated.latency import StepShape


class Efficiency(StrictModel):
    """What of the datasheet is reached, and what a step costs beside. The defaults were fitted on Hopper GPUs."""

    compute: PositiveFloat = Field(default=0.55, le=1, description="Share of the tensor rate in matrix products.")
    attention: PositiveFloat = Field(default=0.66, le=1, description="Share of the 16-bit tensor rate in attention.")
    memory: PositiveFloat = Field(default=0.88, le=1, description="Share of the memory bandwidth.")
    link: PositiveFloat = Field(default=0.67, le=1, description="Share of the link bandwidth in all-reduces.")
    step_overhead_s: NonNegativeFloat = Field(default=1.4e-3, description="Host and launch time of each step.")
    sequence_overhead_s: NonNegativeFloat = Field(default=3.7e-6, description="Host and sampling time of a sequence.")
    all_reduce_s: NonNegativeFloat = Field(default=3.6e-5, description="Latency of one all-reduce.")


# Fitted to 60 figures of FP8 models on H100 and H200 (root mean square error 8 %), and to 20 of FP4 models on B200
# (5 %). Nothing of the same kind is published for the older generations: they get Hopper's.
_HOPPER = Efficiency()
EFFICIENCIES: dict[Generation, Efficiency] = {
    "ampere": _HOPPER,
    "ada": _HOPPER,
    "hopper": _HOPPER,
    "blackwell": Efficiency(
        compute=0.43,
        attention=0.56,
        memory=0.65,
        link=0.69,
        step_overhead_s=3.9e-3,
        sequence_overhead_s=1.4e-5,
        all_reduce_s=3.6e-5,
    ),
}


class RooflineLatency:
    """Step times of one model on `tensor_parallel` GPUs of one node.

    Args:
        shape: The model.
        gpu: Each of the GPUs.
        tensor_parallel: > 0.
        weights: Precision of weights and matrix products.
        kv_cache: Precision of keys and values.
        efficiency: How well the hardware is used.
    """

    def __init__(
        self,
        shape: ModelShape,
        gpu: GpuDatasheet,
        tensor_parallel: int,
        weights: Precision,
        kv_cache: Precision,
        efficiency: Efficiency,
    ) -> None:
        self._shape = shape
        rate = gpu.tflops(weights) * 1e12 * efficiency.compute * tensor_parallel
        head_rate = gpu.bf16_tflops * 1e12 * efficiency.compute * tensor_parallel
        bandwidth = gpu.memory_gb_per_s * 1e9 * efficiency.memory * tensor_parallel
        active = max(1, shape.experts_per_token)
        self._token_s = 2 * shape.layers * (shape.attention_weights + active * shape.expert_weights) / rate
        self._expert_read_s = shape.layers * shape.expert_weights * BYTES_PER_WEIGHT[weights] / bandwidth
        self._attention_read_s = shape.layers * shape.attention_weights * BYTES_PER_WEIGHT[weights] / bandwidth
        self._head_s = 2 * shape.head_weights / head_rate
        self._head_read_s = 2 * shape.head_weights / bandwidth
        pair_flops = 4 * shape.layers * shape.heads * shape.head_dim
        self._pair_s = pair_flops / (gpu.bf16_tflops * 1e12 * efficiency.attention * tensor_parallel)
        self._kv_read_s = shape.kv_bytes_per_token(kv_cache) / bandwidth
        self._step_s = efficiency.step_overhead_s
        self._sequence_s = efficiency.sequence_overhead_s
        self._reduce_token_s = 0.0
        if tensor_parallel > 1:
            reduces = 2 * shape.layers  # after attention and after the feed-forward network
            self._step_s += reduces * efficiency.all_reduce_s
            moved = 2 * (tensor_parallel - 1) / tensor_parallel * 2 * shape.hidden  # ring, 16-bit activations
            self._reduce_token_s = reduces * moved / (gpu.link_gb_per_s * 1e9 * efficiency.link)

    def step_s(self, shape: StepShape) -> float:
        tokens = shape.prefill_tokens + shape.decode_sequences
        outputs = shape.prefill_ends + shape.decode_sequences
        products_s = max(
            tokens * self._token_s, self._attention_read_s + self._expert_read_s * self._experts_read(tokens)
        )
        head_s = max(outputs * self._head_s, self._head_read_s) if outputs else 0.0
        return (
            self._step_s
            + products_s
            + head_s
            + shape.prefill_pairs * self._pair_s
            + shape.decode_context_tokens * self._kv_read_s
            + tokens * self._reduce_token_s
            + outputs * self._sequence_s
        )

    def _experts_read(self, tokens: int) -> float:
        """Return how many experts of a layer some token visits, if each token's experts were drawn at random."""
        if not self._shape.experts:
            return 1.0
        missed = (1.0 - self._shape.experts_per_token / self._shape.experts) ** tokens
        return self._shape.experts * (1.0 - missed)


def kv_capacity_tokens(
    shape: ModelShape,
    gpu: GpuDatasheet,
    tensor_parallel: int,
    weights: Precision,
    kv_cache: Precision,
    free_fraction: float,
    reserved_gb: float,
) -> int:
    """Return how many tokens' keys and values fit beside the weights.

    The cache takes `free_fraction` of the memory that is free after loading, as TensorRT-LLM's
    `free_gpu_memory_fraction` does; CUDA, NCCL, activations and graphs take `reserved_gb` (1e9 bytes) of each GPU.
    """
    weight_bytes = (
        shape.weights * BYTES_PER_WEIGHT[weights] + 2 * 2 * shape.head_weights
    )  # embeddings and head, 16 bits
    free_bytes = tensor_parallel * (gpu.memory_gb - reserved_gb) * 1e9 - weight_bytes
    return max(0, int(free_bytes * free_fraction / shape.kv_bytes_per_token(kv_cache)))
