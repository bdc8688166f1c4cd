"""MemoryPlan: what takes the memory of one GPU, and how many tokens and sequences the rest holds. PURE.

Weights, keys and values are counted exactly; activations by the largest tensors of one step; what the runtime takes is
an estimate on the safe side of logs of TensorRT-LLM, which has to measure it at every start.
"""

import math
from dataclasses import dataclass

from builders.plan.candidates import Candidate
from builders.plan.goal import Goal
from serve.artifacts.manifest import BundleKind
from serve.engines.simulated.model_shape import ModelShape
from serve.engines.simulated.split import Split, WeightBytes

TOKENS_PER_BLOCK = 32
KV_FRACTION = 0.9  # of what is free once the model is loaded: the default of our engine settings
_GB = 1e9
_CONTEXT_GB = 1.2  # CUDA context, the libraries' kernels and workspaces
_LINK_GB = 0.8  # NCCL's and custom all-reduces' buffers, with several ranks
_GRAPH_GB = 0.6  # CUDA graphs of some thirty batch sizes
_ACTIVATION_BYTES = 2
_LOGIT_BYTES = 6  # 16 bits as they are computed, 32 as they are sampled from
# The transformers engine on a CPU takes at most so many tokens, or one full context.
_CPU_KV_TOKENS = 32768


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of each GPU of the pipeline stage that has the least room, in bytes.

    Attributes:
        total: What the driver reports.
        stage: Which stage that is.
        weights: Of one rank.
        activations: Of the largest step.
        logits: Of the largest batch.
        runtime: CUDA, NCCL, graphs.
        kv_cache: What keys and values get; negative: the weights do not even fit.
        kv_bytes_per_token: On this GPU, of a token within all windows.
        kv_bytes_per_sequence: On this GPU, of a sequence of mean length, in whole blocks.
        kv_tokens: Tokens within all windows that the whole engine holds.
        sequences: Sequences of mean length that the whole engine holds.
    """

    total: float
    stage: int
    weights: WeightBytes
    activations: float
    logits: float
    runtime: float
    kv_cache: float
    kv_bytes_per_token: float
    kv_bytes_per_sequence: float
    kv_tokens: int
    sequences: int

    @property
    def free(self) -> float:
        """What is left once the model is loaded and has been warmed up; negative: it cannot be."""
        return self.total - self.weights.total - self.activations - self.logits - self.runtime


def plan_memory(
    shape: ModelShape, candidate: Candidate, goal: Goal, *, max_batch_size: int, max_num_tokens: int
) -> MemoryPlan:
    """Count a candidate's memory.

    Args:
        shape: The model.
        candidate: How it is served.
        goal: For the length of sequences.
        max_batch_size: Sequences of a step; with attention data parallelism of each tensor rank.
        max_num_tokens: Tokens of it, in the same way.
    """
    shape = _as_cached(shape)
    stages = [
        _plan_stage(shape, candidate, goal, stage, max_batch_size, max_num_tokens)
        for stage in range(candidate.split.pipeline)
    ]
    return min(stages, key=lambda plan: (plan.kv_tokens, plan.kv_cache))


def _plan_stage(
    shape: ModelShape, candidate: Candidate, goal: Goal, stage: int, max_batch_size: int, max_num_tokens: int
) -> MemoryPlan:
    split, precisions = candidate.split, candidate.precisions
    weights = split.weight_bytes(shape, precisions, stage)
    is_cpu = candidate.offer.gpu.generation == "cpu"
    is_last = stage == split.pipeline - 1
    activations = activation_bytes(shape, split, max_num_tokens)
    logits = float(max_batch_size * shape.vocab * _LOGIT_BYTES) if is_last else 0.0
    runtime = runtime_bytes(candidate)
    total = candidate.offer.gpu.memory_bytes
    free = total - weights.total - activations - logits - runtime
    per_token = split.kv_bytes_per_token(shape, precisions.kv_cache, stage)
    cache = free * KV_FRACTION
    if is_cpu:
        cache = min(cache, max(_CPU_KV_TOKENS, shape.context_tokens) * per_token)
    blocks = math.ceil(goal.sequence_tokens / TOKENS_PER_BLOCK)
    per_sequence = split.kv_bytes(shape, precisions.kv_cache, blocks * TOKENS_PER_BLOCK, stage)
    groups = split.tensor if split.attention_dp else 1  # each of which has sequences of its own
    return MemoryPlan(
        total=total,
        stage=stage,
        weights=weights,
        activations=activations,
        logits=logits,
        runtime=runtime,
        kv_cache=cache,
        kv_bytes_per_token=per_token,
        kv_bytes_per_sequence=per_sequence,
        kv_tokens=groups * max(0, int(cache / per_token)),
        sequences=groups * max(0, int(cache / per_sequence)),
    )


def activation_bytes(shape: ModelShape, split: Split, tokens: int) -> float:
    """Return what the largest tensors of a layer take in a step of so many tokens.

    The residual stream and its norm, queries, keys, values and attention's output, and the wide layer of the
    feed-forward network with both of its halves; of experts, all copies of a token that its experts work on.
    """
    cut = 1 if split.attention_dp else split.tensor
    attention = shape.heads * (shape.head_dim + shape.values) + 2 * shape.kv_heads * shape.values
    dense_width = max(shape.dense_intermediate or 0, shape.shared_intermediate, shape.intermediate)
    network = 3 * dense_width / split.tensor
    if shape.experts:
        network = max(network, shape.experts_per_token * (2 * shape.hidden + 3 * shape.intermediate) / split.tensor)
        if split.attention_dp:  # the tokens of all ranks come together for the experts
            network *= split.tensor
    return tokens * _ACTIVATION_BYTES * (4 * shape.hidden + attention / cut + network)


def runtime_bytes(candidate: Candidate) -> float:
    """Return what is taken whatever the model is."""
    if candidate.kind is BundleKind.TRANSFORMERS_CHECKPOINT:
        return (0.5 if candidate.offer.gpu.generation == "cpu" else _CONTEXT_GB) * _GB
    links = _LINK_GB if candidate.split.world_size > 1 else 0.0
    return (_CONTEXT_GB + _GRAPH_GB + links) * _GB


def longest_sequence(shape: ModelShape, candidate: Candidate, memory: MemoryPlan) -> int:
    """Return the tokens of the longest sequence that fits alone, in whole blocks, up to the model's context."""
    kept, split, precision = _as_cached(shape), candidate.split, candidate.precisions.kv_cache
    fits, too_many = 0, shape.context_tokens // TOKENS_PER_BLOCK + 1
    while too_many - fits > 1:
        blocks = (fits + too_many) // 2
        size = split.kv_bytes(kept, precision, blocks * TOKENS_PER_BLOCK, memory.stage)
        fits, too_many = (blocks, too_many) if size <= memory.kv_cache else (fits, blocks)
    return fits * TOKENS_PER_BLOCK if too_many * TOKENS_PER_BLOCK <= shape.context_tokens else shape.context_tokens


def _as_cached(shape: ModelShape) -> ModelShape:
    """Return the shape without windows that the engine cannot be told of: it keeps all tokens in all layers."""
    if not shape.windowed_layers or shape.window_pattern(1) is not None:
        return shape
    return shape.model_copy(update={"windowed_layers": 0, "window_tokens": None})
