"""SimReplica: one simulated engine in virtual time, its admission, and what it publishes of itself."""

import math
from collections.abc import Callable

from serve.core.kv_events import KvRemoved, KvStored
from serve.core.routing.load import LoadReport
from serve.engines.simulated.scheduler import Scheduler
from serve.engines.simulated.sequence import ScheduledSequence
from serve.engines.simulated.settings import SimulatedSettings
from serve.engines.simulated.timeline import Progress, Timeline
from sim.options import SimOptions
from sim.publication import KvMessage, LoadMessage, Message


class SimSequence(ScheduledSequence):
    """A request in an engine.

    Attributes:
        number: Of the request in the workload.
        route_id: Its name in reservations and reports.
        expected_tokens: Prompt tokens that the gateway believes it will compute.
    """

    __slots__ = ("expected_tokens", "number", "route_id")

    number: int
    route_id: int
    expected_tokens: int


class SimReplica:
    """One engine, admitting as `SimulatedEngine` does and publishing as `EventPublisher` and `LoadReporter` do.

    Args:
        number: Of the replica.
        settings: Of its engine.
        options: How often it publishes.
        send: Takes each new message.
    """

    def __init__(
        self, number: int, settings: SimulatedSettings, options: SimOptions, send: Callable[[Message], None]
    ) -> None:
        self.number = number
        self.name = replica_name(number)
        self.limits = settings.make_limits()
        self.context_tokens = min(settings.context_tokens, self.limits.total_blocks * self.limits.tokens_per_block)
        self.timeline: Timeline[SimSequence] = Timeline(Scheduler(self.limits, settings.latency.make_model()))
        self._max_waiting = settings.max_waiting
        self._options = options
        self._send = send
        self._kv = KvMessage(number, -math.inf)  # the last one, which may not have been sent yet
        self._load = LoadMessage(number, -math.inf)
        self._committed_blocks = 0
        self._expected_tokens = 0  # prompt tokens that gateways believe will be computed for those without first token

    @property
    def next_s(self) -> float:
        """When the engine's next event is due."""
        return self.timeline.next_s

    @property
    def is_full(self) -> bool:
        """Whether the next request would be refused."""
        scheduler = self.timeline.scheduler
        free = 0 if scheduler.blocked else self.limits.max_batch_size - scheduler.running
        return len(scheduler.waiting) >= self._max_waiting + free

    def fits(self, prompt_tokens: int, max_tokens: int) -> bool:
        """Return whether such a request can ever run here."""
        return prompt_tokens + max_tokens <= self.context_tokens and self.limits.fits(prompt_tokens, max_tokens)

    def submit(self, sequence: SimSequence, now_s: float) -> None:
        """Let a sequence arrive, which fits."""
        self.timeline.submit(sequence, now_s)
        self._committed_blocks += self._blocks(sequence)
        self._expected_tokens += sequence.expected_tokens
        self._publish(now_s, self.timeline.scheduler.take_events(), sequence.route_id)

    def advance(self, now_s: float) -> list[Progress[SimSequence]]:
        """Do all that is due; return what happened."""
        progress = self.timeline.advance(now_s)
        for moment in progress:
            for sequence in moment.prefilled:
                if sequence.first_token_s == moment.at_s:  # not one that was preempted, and computed again
                    self._expected_tokens -= sequence.expected_tokens
            for sequence in moment.finished:
                self._committed_blocks -= self._blocks(sequence)
        if progress:
            self._publish(now_s, [event for moment in progress for event in moment.events])
        return progress

    def _blocks(self, sequence: SimSequence) -> int:
        return -(-(sequence.prompt_tokens + sequence.max_tokens) // self.limits.tokens_per_block)

    # What is published

    def _publish(self, now_s: float, events: list[KvStored | KvRemoved], accepted: int | None = None) -> None:
        if events:
            self._publish_events(now_s, events)
        last = self._load
        if last.is_sent or last.at_s < now_s:
            sent_s = last.at_s
            if last.goes_on:  # while it decodes, it sends reports by itself
                interval_s = self._options.progress_interval_s
                sent_s += (now_s - sent_s) // interval_s * interval_s
            self._load = LoadMessage(self.number, max(now_s, sent_s + self._options.load_interval_s))
        if accepted is not None:
            self._load.accepted.append(accepted)
        self._load.show(self._report(), self.timeline.decode_run)
        if self._load is not last:
            self._send(self._load)

    def _publish_events(self, now_s: float, events: list[KvStored | KvRemoved]) -> None:
        last = self._kv
        if last.is_sent or last.at_s < now_s:
            self._kv = KvMessage(self.number, max(now_s, last.at_s + self._options.kv_interval_s))
            self._send(self._kv)
        self._kv.events += events

    def _report(self) -> LoadReport:
        timeline = self.timeline
        scheduler = timeline.scheduler
        decoding = scheduler.decoding
        return LoadReport(
            running=scheduler.running,
            waiting=len(scheduler.waiting),
            queued_prefill_tokens=min(scheduler.queued_prefill_tokens, self._expected_tokens),
            used_blocks=scheduler.pool.used_blocks,
            total_blocks=self.limits.total_blocks,
            committed_blocks=self._committed_blocks,
            context_tokens=decoding.context_tokens,
            prefilled_tokens=scheduler.computed_prompt_tokens,
            prefilled_pairs=scheduler.computed_prompt_pairs,
            generated_tokens=decoding.total_tokens,
            steps=timeline.steps,
            busy_s=timeline.busy_s,
            read_tokens=scheduler.read_tokens,
        )


def replica_name(number: int) -> str:
    """Return the id of a replica."""
    return f"replica-{number}"
