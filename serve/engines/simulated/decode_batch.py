"""DecodeBatch: the sequences that get one token a step, at next to no cost a step.

A sequence's progress is the difference between a common counter and its value when the sequence entered. What happens
to a sequence happens at known counts: it fills a block every `tokens_per_block` steps, so sequences are kept by the
remainder at which they do; and it ends at one count, so these are kept in a heap.
"""

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import Generic

from serve.engines.simulated.sequence import SequenceState, SequenceT

_SLACK = 64  # entries of sequences that have left which are not worth a compaction


class DecodeBatch(Generic[SequenceT]):
    """Sequences that have their prompt's keys and values, and want more tokens.

    Args:
        tokens_per_block: > 0.

    Attributes:
        total_tokens: Output tokens of all sequences there ever were.
    """

    def __init__(self, tokens_per_block: int) -> None:
        self.sequences: dict[SequenceT, None] = {}
        self.total_tokens = 0
        self.context_tokens = 0  # whose keys and values they will read in their next step, summed over them
        self._size = tokens_per_block
        self._count = 0
        self._ends: list[tuple[int, int, SequenceT]] = []  # (count at its end, serial, sequence)
        self._phases: dict[int, dict[SequenceT, None]] = {}  # remainder of the count -> sequences; none is empty

    def __len__(self) -> int:
        return len(self.sequences)

    def enter(self, sequence: SequenceT) -> None:
        """Add a sequence whose prompt has just been completed, which yields its next token."""
        if sequence.output_tokens:
            sequence.produced_tokens += 1
            self.total_tokens += 1
        sequence.state = SequenceState.DECODE
        sequence.entered = self._count
        self.sequences[sequence] = None
        self.context_tokens += sequence.prefill_tokens + 1
        heappush(self._ends, (self._end(sequence), sequence.serial, sequence))
        self._phases.setdefault(self._phase(sequence), {})[sequence] = None

    def leave(self, sequence: SequenceT) -> None:
        """Take a sequence out, and fix the number of tokens that it has."""
        steps = self._count - sequence.entered
        del self.sequences[sequence]
        phase = self._phases[self._phase(sequence)]
        del phase[sequence]
        if not phase:
            del self._phases[self._phase(sequence)]
        sequence.produced_tokens += steps
        self.context_tokens -= sequence.prefill_tokens + steps + 1
        if len(self._ends) > 2 * len(self.sequences) + _SLACK:
            self._ends[:] = [entry for entry in self._ends if entry[2] is not sequence and self._is_valid(entry)]
            heapify(self._ends)

    def generated_tokens(self, sequence: SequenceT) -> int:
        """Return how many output tokens a sequence of the batch has."""
        return sequence.produced_tokens + self._count - sequence.entered

    def kv_tokens(self, sequence: SequenceT) -> int:
        """Return how many tokens' keys and values a sequence of the batch has: its last token's are never there."""
        return sequence.prefill_tokens + self._count - sequence.entered

    def step(self) -> list[SequenceT]:
        """Give each sequence a token. Returns those that filled a block by it."""
        self._count += 1
        self.context_tokens += len(self.sequences)
        self.total_tokens += len(self.sequences)
        return list(self._phases.get(self._count % self._size, ()))

    def steps(self, steps: int) -> Iterator[list[SequenceT]]:
        """Give each sequence `steps` tokens. Yields, in between, those that fill a block; none may end or leave."""
        start, end, size = self._count, self._count + steps, len(self.sequences)
        self.total_tokens += steps * size
        offsets = sorted((phase - start - 1) % self._size + 1 for phase in self._phases)
        while start < end:
            for count in [start + offset for offset in offsets]:
                if count > end:
                    break
                self.context_tokens += (count - self._count) * size
                self._count = count
                yield list(self._phases[count % self._size])
            start += self._size
        self.context_tokens += (end - self._count) * size
        self._count = end

    def ended(self) -> Iterator[SequenceT]:
        """Yield, and forget, each sequence that has all its tokens. The consumer takes it out."""
        ends = self._ends
        while ends and ends[0][0] <= self._count:
            entry = heappop(ends)
            if self._is_valid(entry):
                yield entry[2]

    def steps_to_end(self) -> int:
        """Return after how many steps the next sequence ends. The batch is not empty."""
        ends = self._ends
        while not self._is_valid(ends[0]):
            heappop(ends)
        return ends[0][0] - self._count

    def _is_valid(self, entry: tuple[int, int, SequenceT]) -> bool:
        # The entry of a sequence that was cancelled or preempted is not searched for: it stays until it comes up.
        count, _, sequence = entry
        return sequence.state is SequenceState.DECODE and count == self._end(sequence)

    def _end(self, sequence: SequenceT) -> int:
        return sequence.entered + sequence.output_tokens - sequence.produced_tokens

    def _phase(self, sequence: SequenceT) -> int:
        return (sequence.entered - sequence.prefill_tokens) % self._size
