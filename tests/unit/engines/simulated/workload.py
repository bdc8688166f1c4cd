"""Random workloads for the scheduler, small enough to collide: shared prefixes, tiny caches, cancellations."""

import random
from dataclasses import dataclass

from hypothesis import strategies as st

from serve.core.blocks import ROOT
from serve.engines.simulated.latency import StepShape
from serve.engines.simulated.limits import SchedulerLimits
from serve.engines.simulated.sequence import ScheduledSequence

SIZE = 4  # tokens_per_block


@dataclass(frozen=True)
class Arrival:
    """A request: what its prompt begins with, its lengths, when it comes, and when it is taken back."""

    family: int
    prompt_tokens: int
    max_tokens: int
    output_tokens: int
    at_s: float
    cancel_s: float | None


arrivals = st.lists(
    st.builds(
        Arrival,
        family=st.integers(0, 2),
        prompt_tokens=st.integers(1, 30),
        max_tokens=st.integers(0, 20),
        output_tokens=st.integers(0, 20),
        at_s=st.floats(0, 0.2),
        cancel_s=st.one_of(st.none(), st.none(), st.floats(0, 0.4)),
    ),
    max_size=14,
)

limits = st.builds(
    SchedulerLimits,
    total_blocks=st.integers(13, 40),
    tokens_per_block=st.just(SIZE),
    max_batch_size=st.integers(1, 8),
    max_num_tokens=st.integers(50, 64),
    chunked_prefill=st.booleans(),
    guaranteed_no_evict=st.booleans(),
    share_prefixes=st.booleans(),
)
small_chunks = st.builds(
    SchedulerLimits,
    total_blocks=st.integers(13, 40),
    tokens_per_block=st.just(SIZE),
    max_batch_size=st.integers(1, 6),
    max_num_tokens=st.integers(10, 20),
    guaranteed_no_evict=st.booleans(),
)


def block_hash(family: int, serial: int, block: int, prompt_blocks: int) -> int:
    """Return a hash: prompts of a family share their first blocks, and every second one of its outputs is the same."""
    owner = serial if block >= prompt_blocks and serial % 2 else -1
    return random.Random(f"{family} {owner} {block}").getrandbits(63)


def make_sequence(arrival: Arrival, serial: int) -> ScheduledSequence:
    """Make the sequence of an arrival."""
    blocks = arrival.prompt_tokens // SIZE
    return ScheduledSequence(
        str(serial),
        arrival.prompt_tokens,
        [block_hash(arrival.family, serial, block, blocks) for block in range(blocks)],
        root=ROOT,
        max_tokens=arrival.max_tokens,
        output_tokens=arrival.output_tokens,
        next_hash=lambda block: block_hash(arrival.family, serial, block, blocks),
    )


class CheckedLatency:
    """An affine model that remembers what it was asked."""

    def __init__(self) -> None:
        self.shapes: list[StepShape] = []

    def step_s(self, shape: StepShape) -> float:
        self.shapes.append(shape)
        return (
            1e-3
            + 1e-5 * shape.prefill_tokens
            + 1e-6 * shape.prefill_pairs
            + 2e-5 * shape.decode_sequences
            + 1e-6 * shape.decode_context_tokens
        )
