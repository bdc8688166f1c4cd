"""Sizes: max_batch_size and max_num_tokens of a candidate's engine. PURE."""

from dataclasses import dataclass

from builders.plan.candidates import Candidate
from builders.plan.goal import Goal
from builders.plan.load import Limits
from builders.plan.memory import MemoryPlan, plan_memory
from serve.artifacts.manifest import BundleKind
from serve.engines.simulated.latency import StepShape
from serve.engines.simulated.model_shape import ModelShape
from serve.engines.simulated.roofline import RooflineLatency

# Powers of two and what is half way between them, as CUDA graphs are recorded.
BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
STEP_TOKENS = (8192, 4096, 2048, 1024, 512)
_CPU_STEP_TOKENS = 512  # the transformers engine's own on a CPU
_CPU_BATCH = 64
# A full step delays the next token of every stream; this many times the limit of the mean is a visible stutter.
STUTTER = 5.0


@dataclass(frozen=True)
class Sizes:
    """Sizes of one engine, and the memory that follows from them.

    Attributes:
        max_batch_size, max_num_tokens: As the engine's settings have them: of a pipeline stage's group of sequences,
            and with attention data parallelism of each rank.
        memory: Of each GPU.
        limits: Of the engine as a whole.
    """

    max_batch_size: int
    max_num_tokens: int
    memory: MemoryPlan
    limits: Limits


def choose_sizes(shape: ModelShape, candidate: Candidate, goal: Goal, latency: RooflineLatency) -> Sizes:
    """Choose the largest batch that the memory lets be full, and steps that let no stream stutter."""
    step_tokens = choose_step_tokens(candidate, goal, latency)
    largest = _CPU_BATCH if candidate.offer.gpu.generation == "cpu" else BATCH_SIZES[-1]
    sizes = [size for size in BATCH_SIZES if size <= min(largest, step_tokens // 2)]
    low, high = 0, len(sizes)  # sizes[low] is not too large, unless all are
    while high - low > 1:
        middle = (low + high) // 2
        chosen = with_batch(shape, candidate, goal, sizes[middle], step_tokens)
        fills = chosen.memory.sequences > sizes[middle - 1] * groups(candidate)
        low, high = (middle, high) if fills else (low, middle)
    return with_batch(shape, candidate, goal, sizes[low], step_tokens)


def with_batch(shape: ModelShape, candidate: Candidate, goal: Goal, batch: int, step_tokens: int) -> Sizes:
    """Return the sizes with a given batch."""
    memory = plan_memory(shape, candidate, goal, max_batch_size=batch, max_num_tokens=step_tokens)
    together = groups(candidate)
    limits = Limits(min(memory.sequences, batch * together), step_tokens * together)
    return Sizes(batch, step_tokens, memory, limits)


def shrink(sizes: Sizes, shape: ModelShape, candidate: Candidate, goal: Goal, sequences: float) -> Sizes:
    """Return sizes with the smallest batch that holds so many sequences, which leaves more memory to the KV cache."""
    together = groups(candidate)
    enough = (size for size in BATCH_SIZES if size * together >= sequences)
    batch = min(next(enough, sizes.max_batch_size), sizes.max_batch_size)
    return with_batch(shape, candidate, goal, batch, sizes.max_num_tokens)


def choose_step_tokens(candidate: Candidate, goal: Goal, latency: RooflineLatency) -> int:
    """Return the largest step that delays a stream's next token by no more than a stutter."""
    if candidate.kind is BundleKind.TRANSFORMERS_CHECKPOINT:
        return _CPU_STEP_TOKENS if candidate.offer.gpu.generation == "cpu" else 4096
    if goal.tpot_ms is None:
        return STEP_TOKENS[0]
    for tokens in STEP_TOKENS:
        step_s = latency.step_s(StepShape(tokens * groups(candidate), 0.0, 1))
        if step_s * 1e3 <= STUTTER * goal.tpot_ms:
            return tokens
    return STEP_TOKENS[-1]


def groups(candidate: Candidate) -> int:
    """Return how many batches are computed at the same time: one in each stage, one on each rank that has its own."""
    return candidate.split.pipeline * (candidate.split.tensor if candidate.split.attention_dp else 1)
