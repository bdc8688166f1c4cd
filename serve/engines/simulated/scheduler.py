"""Scheduler: in-flight batching over paged KV blocks, as a state machine without a clock.

A step is `begin` and, after the time that it returns, `complete`: every decoding sequence gets one token, and what is
left of the token budget goes to prompts, first come first served, in chunks. Sequences are admitted when their blocks
can be promised to their last token, so that none is ever preempted (TensorRT-LLM's GUARANTEED_NO_EVICT, its default),
or as soon as their prompt fits, at the risk of preemption (MAX_UTILIZATION).
"""

from collections import OrderedDict
from typing import Generic, NamedTuple

from serve.core.kv_events import KvRemoved, KvStored
from serve.engines.simulated.blocks import BlockPool
from serve.engines.simulated.decode_batch import DecodeBatch
from serve.engines.simulated.latency import DecodeRun, LatencyModel, StepShape, decode_run
from serve.engines.simulated.limits import SchedulerLimits
from serve.engines.simulated.sequence import ScheduledSequence, SequenceState, SequenceT

_MAX_SKIPPED = 64  # waiting sequences passed over in one step


class StepResult(NamedTuple, Generic[SequenceT]):
    """What a step brought.

    Attributes:
        prefilled: Sequences whose prompt is complete: they have their next token.
        finished: Sequences that are done, decoding ones and perhaps some of `prefilled`; their blocks are free.
    """

    prefilled: list[SequenceT]
    finished: list[SequenceT]


class Scheduler(Generic[SequenceT]):
    """The batch of one engine.

    Args:
        limits: What it can hold.
        latency: How long steps take.

    Attributes:
        waiting: Sequences that have no place in the batch yet, in the order in which they get one.
        prefilling, decoding: The batch.
        queued_prefill_tokens: Prompt tokens accepted, and neither computed nor found in the cache yet.
        prompt_tokens, cached_prompt_tokens: Totals over all sequences that were admitted.
        read_tokens: Total over all steps of the tokens whose keys and values decoding sequences read.
        computed_prompt_tokens, computed_prompt_pairs: Totals of prompt tokens computed, and of the (query, key) pairs
            of their attention, by the steps that are complete.
        in_step: Whether a step was begun and not completed.
        blocked: Whether the first waiting sequence was found not to fit, and nothing has been freed since.
    """

    def __init__(self, limits: SchedulerLimits, latency: LatencyModel) -> None:
        self.limits = limits
        self.latency = latency
        self.pool = BlockPool(limits.total_blocks)
        self.waiting: OrderedDict[SequenceT, None] = OrderedDict()
        self.prefilling: dict[SequenceT, None] = {}
        self.decoding: DecodeBatch[SequenceT] = DecodeBatch(limits.tokens_per_block)
        self.queued_prefill_tokens = 0
        self.prompt_tokens = 0
        self.cached_prompt_tokens = 0
        self.read_tokens = 0
        self.computed_prompt_tokens = 0
        self.computed_prompt_pairs = 0.0
        self.preemptions = 0
        self._shape = StepShape()
        self._pledged_blocks = 0
        self._submitted = 0
        self._started = 0
        self._chunks: list[tuple[SequenceT, int]] = []
        self.in_step = False
        self.blocked = False

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return len(self.prefilling) + len(self.decoding)

    def take_events(self) -> list[KvStored | KvRemoved]:
        """Return what changed in the cache since the last call, in order."""
        return self.pool.take_events()

    # Sequences come and go

    def submit(self, sequence: SequenceT, now_s: float) -> None:
        """Let a new sequence wait for its place. Allowed during a step.

        Raises:
            ValueError: It can never fit, or has not one hash for each full block of its prompt.
        """
        if not self.limits.fits(sequence.prompt_tokens, sequence.max_tokens):
            raise ValueError(f"{sequence.request_id} can never fit: ask `limits.fits` first")
        blocks = sequence.prompt_tokens // self.limits.tokens_per_block
        if self.limits.share_prefixes and len(sequence.hashes) != blocks:
            raise ValueError(f"{sequence.request_id} has {len(sequence.hashes)} hashes for {blocks} full blocks")
        self._submitted += 1
        sequence.serial = self._submitted
        sequence.arrived_s = now_s
        sequence.state = SequenceState.WAITING
        self.waiting[sequence] = None
        self.queued_prefill_tokens += sequence.prefill_tokens

    def end(self, sequence: SequenceT) -> None:
        """Take a sequence out and free its blocks: it is cancelled, or has said all. Allowed during a step."""
        state = sequence.state
        if state is SequenceState.WAITING:
            del self.waiting[sequence]
            self.queued_prefill_tokens -= sequence.prefill_tokens
            self.blocked = False
        elif state is SequenceState.PREFILL or state is SequenceState.DECODE:
            self._leave_batch(sequence)
        sequence.state = SequenceState.DONE

    def _leave_batch(self, sequence: SequenceT) -> None:
        if sequence.state is SequenceState.PREFILL:
            del self.prefilling[sequence]
            self.queued_prefill_tokens -= sequence.prefill_tokens - sequence.computed_tokens
        else:
            self.decoding.leave(sequence)
        self.pool.give_back(sequence.hashes, sequence.filled_blocks, sequence.open_blocks)
        self._pledged_blocks -= sequence.pledged_blocks
        sequence.filled_blocks = sequence.open_blocks = sequence.pledged_blocks = 0
        self.blocked = False

    # A step

    def begin(self, now_s: float) -> float | None:
        """Begin a step: admit, and choose what is computed.

        Returns:
            How long the step takes, in s; `complete` is due then. None: there is nothing to do.
        """
        if self.in_step:
            raise RuntimeError("the step before has not been completed")
        if self.waiting and not self.blocked:
            self._admit(now_s)
        shape = self._plan()
        if shape is None:
            return None
        self.in_step = True
        self._shape = shape
        return self.latency.step_s(shape)

    def complete(self, now_s: float) -> StepResult[SequenceT]:
        """End the step: count what was computed, and free what is done."""
        self.in_step = False
        result: StepResult[SequenceT] = StepResult([], [])
        if self.decoding.sequences:
            self.read_tokens += self.decoding.context_tokens
            filled = self.decoding.step()
            self._fill_decoded(filled)
            for sequence in self.decoding.ended():
                self._finish(sequence, now_s, result)
            self._grow_decoded(filled)  # those that ended have made room
        if self._chunks:
            self.computed_prompt_tokens += self._shape.prefill_tokens
            self.computed_prompt_pairs += self._shape.prefill_pairs
            chunks, self._chunks = self._chunks, []
            for sequence, tokens in chunks:
                if sequence.state is SequenceState.PREFILL:  # not cancelled or preempted meanwhile
                    self._advance_prefill(sequence, tokens, now_s, result)
        return result

    def _plan(self) -> StepShape | None:
        decode, context = len(self.decoding), self.decoding.context_tokens
        if not self.prefilling:
            return StepShape(0, 0.0, 0, decode, context) if decode else None
        budget, unit = self.limits.max_num_tokens - decode, self.limits.tokens_per_block
        tokens, pairs, ends = 0, 0.0, 0
        for sequence in self.prefilling:
            done = sequence.computed_tokens
            chunk = sequence.prefill_tokens - done
            if chunk <= budget:
                ends += 1
            else:
                chunk = budget - (done + budget) % unit if self.limits.chunked_prefill else 0
                if chunk <= 0:
                    break
            self._chunks.append((sequence, chunk))
            budget -= chunk
            tokens += chunk
            pairs += chunk * done + chunk * (chunk + 1) * 0.5
        return StepShape(tokens, pairs, ends, decode, context)

    # Admission

    def _admit(self, now_s: float) -> None:
        room = self.limits.max_batch_size - self.running
        if room <= 0:
            return
        share = self.limits.share_prefixes
        being_computed = {
            s.hashes[s.filled_blocks] for s in self.prefilling if share and s.filled_blocks < len(s.hashes)
        }
        skipped = 0
        for sequence in self._first_waiting(room + _MAX_SKIPPED):
            if room == 0:
                return
            max_hit = self._max_hit(sequence)
            hit = self.pool.hit_blocks(sequence.hashes, max_hit)
            if hit < max_hit and sequence.hashes[hit] in being_computed:
                # Another prompt with this block is being computed: to reuse its blocks in a moment is better than to
                # compute them twice. So does TensorRT-LLM's capacity scheduler when block reuse is on.
                skipped += 1
                continue
            if skipped > _MAX_SKIPPED:
                return
            if not self._promise(sequence, hit):
                self.blocked = not skipped
                return
            self._start(sequence, hit, now_s)
            room -= 1
            if hit < max_hit:
                being_computed.add(sequence.hashes[hit])

    def _first_waiting(self, count: int) -> list[SequenceT]:
        if count >= len(self.waiting):
            return list(self.waiting)
        return [sequence for sequence, _ in zip(self.waiting, range(count), strict=False)]

    def _max_hit(self, sequence: SequenceT) -> int:
        # The last token is always computed: its logits give the next one.
        if not self.limits.share_prefixes:
            return 0
        return min(len(sequence.hashes), (sequence.prefill_tokens - 1) // self.limits.tokens_per_block)

    def _promise(self, sequence: SequenceT, hit: int) -> bool:
        size = self.limits.tokens_per_block
        first = total = -(-sequence.prefill_tokens // size)
        if self.limits.guaranteed_no_evict:
            total = sequence.total_blocks(size)
        room = self.pool.room_blocks - self._pledged_blocks
        if total > room and total - self.pool.in_use(sequence.hashes, hit) > room:
            return False
        sequence.pledged_blocks = total - first
        self._pledged_blocks += total - first
        return True

    def _start(self, sequence: SequenceT, hit: int, now_s: float) -> None:
        size = self.limits.tokens_per_block
        del self.waiting[sequence]
        self.pool.use(sequence.hashes, hit)
        sequence.filled_blocks = hit
        sequence.open_blocks = -(-sequence.prefill_tokens // size) - hit
        self.pool.open(sequence.open_blocks)
        sequence.computed_tokens = hit * size
        self.queued_prefill_tokens -= sequence.computed_tokens
        if sequence.started_s < 0:
            sequence.started_s = now_s
            sequence.cached_tokens = hit * size
            self.prompt_tokens += sequence.prompt_tokens
            self.cached_prompt_tokens += sequence.cached_tokens
        self._started += 1
        sequence.started_as = self._started
        sequence.state = SequenceState.PREFILL
        self.prefilling[sequence] = None

    # Progress

    def _advance_prefill(self, sequence: SequenceT, tokens: int, now_s: float, result: StepResult[SequenceT]) -> None:
        sequence.computed_tokens += tokens
        self.queued_prefill_tokens -= tokens
        full = sequence.computed_tokens // self.limits.tokens_per_block
        if full > len(sequence.hashes):  # preempted: the last block has output in it, and was not filled before
            self._learn_hash(sequence)
            full = len(sequence.hashes)
        if full > sequence.filled_blocks and self.limits.share_prefixes:
            self._fill(sequence, full)
        if sequence.computed_tokens < sequence.prefill_tokens:
            return
        result.prefilled.append(sequence)
        if sequence.first_token_s < 0:
            sequence.first_token_s = now_s
        del self.prefilling[sequence]
        self.decoding.enter(sequence)
        if sequence.produced_tokens >= sequence.output_tokens:
            self._finish(sequence, now_s, result)
        elif sequence.prefill_tokens % self.limits.tokens_per_block == 0:
            self._grow(sequence)

    def _learn_hash(self, sequence: SequenceT) -> None:
        if sequence.next_hash is not None:
            sequence.hashes.append(sequence.next_hash(len(sequence.hashes)))

    def _fill(self, sequence: SequenceT, full: int) -> None:
        first = sequence.filled_blocks
        parent = sequence.hashes[first - 1] if first else sequence.root
        freed = self.pool.fill(sequence.hashes[first:full], parent)
        sequence.filled_blocks = full
        sequence.open_blocks -= full - first
        if freed and self.prefilling:  # while all decode, only an end lets others in: steps stay uniform until then
            self.blocked = False

    def _fill_decoded(self, sequences: list[SequenceT]) -> None:
        """Make the block reusable that each of these has just filled with output."""
        if not self.limits.share_prefixes:
            return
        for sequence in sequences:
            if sequence.next_hash is not None:
                if sequence.filled_blocks == len(sequence.hashes):
                    self._learn_hash(sequence)
                self._fill(sequence, sequence.filled_blocks + 1)

    def _grow_decoded(self, sequences: list[SequenceT]) -> None:
        for sequence in sequences:
            if sequence.state is SequenceState.DECODE:  # not ended, nor preempted by one before it
                self._grow(sequence)

    def _grow(self, sequence: SequenceT) -> None:
        while self.pool.room_blocks == 0:  # never if blocks were promised
            victim = max((*self.decoding.sequences, *self.prefilling), key=_started_as)
            self._preempt(victim)
            if victim is sequence:
                return
        self.pool.open(1)
        sequence.open_blocks += 1
        if sequence.pledged_blocks:
            sequence.pledged_blocks -= 1
            self._pledged_blocks -= 1

    def _preempt(self, sequence: SequenceT) -> None:
        """Take a sequence's blocks away; it waits, before all others, to be computed again with the output it has."""
        self._leave_batch(sequence)
        if sequence.state is SequenceState.DECODE:
            sequence.prefill_tokens = sequence.prompt_tokens + sequence.produced_tokens
        sequence.computed_tokens = 0
        sequence.preemptions += 1
        self.preemptions += 1
        sequence.state = SequenceState.WAITING
        self.waiting[sequence] = None
        self.waiting.move_to_end(sequence, last=False)
        self.queued_prefill_tokens += sequence.prefill_tokens

    def _finish(self, sequence: SequenceT, now_s: float, result: StepResult[SequenceT]) -> None:
        sequence.finished_s = now_s
        self.end(sequence)
        result.finished.append(sequence)

    # Many steps at once

    def uniform_steps(self) -> int:
        """Return how many steps, the one that was begun and those after it, do nothing but decode the same sequences.

        Only in the last of them can a sequence end. 0: the step that was begun is not of that kind.
        """
        if self.prefilling or not self.decoding.sequences or not self.in_step:
            return 0
        if self.waiting and not self.blocked and self.running < self.limits.max_batch_size:
            return 1
        steps = self.decoding.steps_to_end()
        if not self.limits.guaranteed_no_evict:  # nor may one be preempted
            steps = min(steps, max(1, self.pool.room_blocks // len(self.decoding) * self.limits.tokens_per_block))
        return steps

    def run_of(self, steps: int) -> DecodeRun:
        """Return how long `steps` uniform steps take, of which the first was begun."""
        return decode_run(self.latency, len(self.decoding), self.decoding.context_tokens, steps)

    def skip(self, steps: int) -> None:
        """Complete `steps` < `uniform_steps` steps, of which the first was begun, and begin the next."""
        self.read_tokens += steps * self.decoding.context_tokens + len(self.decoding) * (steps * (steps - 1) // 2)
        for filled in self.decoding.steps(steps):
            self._fill_decoded(filled)
            self._grow_decoded(filled)


def _started_as(sequence: ScheduledSequence) -> int:
    return sequence.started_as
