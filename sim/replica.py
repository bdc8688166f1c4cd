"""SimReplica: one simulated engine in virtual time, its admission, and what it publishes of itself."""

import math

from serve.core.routing.load import LoadReport
from serve.engines.simulated.scheduler import Scheduler
from serve.engines.simulated.sequence import ScheduledSequence
from serve.engines.simulated.settings import SimulatedSettings
from serve.engines.simulated.timeline import Progress, Timeline
from sim.publication import Publication


class SimSequence(ScheduledSequence):
    """A request in an engine.

    Attributes:
        number: Of the request in the workload.
        route_id: Its name in reservations and reports.
        expected_tokens: Prompt tokens that the gateway believes it will compute; 0 once it has its first token.
    """

    __slots__ = ("expected_tokens", "number", "route_id")

    number: int
    route_id: int
    expected_tokens: int


class SimReplica:
    """One engine.

    It publishes when something has changed, and `interval_s` or more after the publication before.

    Args:
        number: Of the replica.
        settings: Of its engine.
        interval_s: > 0.
    """

    def __init__(self, number: int, settings: SimulatedSettings, interval_s: float) -> None:
        self.number = number
        self.name = f"replica-{number}"
        self.limits = settings.make_limits()
        self.context_tokens = min(settings.context_tokens, self.limits.total_blocks * self.limits.tokens_per_block)
        self.timeline: Timeline[SimSequence] = Timeline(Scheduler(self.limits, settings.latency.make_model()))
        self._max_waiting = settings.max_waiting
        self._interval_s = interval_s
        self._publication = Publication(number, -math.inf)  # the last one, which may still be open
        self._committed_blocks = 0
        self._released_blocks = 0
        self._expected_tokens = 0  # prompt tokens that gateways believe will be computed for those without first token
        self._prefilled_tokens = 0
        self._prefilled_pairs = 0.0

    @property
    def next_s(self) -> float:
        """When the engine's next event is due."""
        return self.timeline.next_s

    def fits(self, prompt_tokens: int, max_tokens: int) -> bool:
        """Return whether such a request can ever run here."""
        return prompt_tokens + max_tokens <= self.context_tokens and self.limits.fits(prompt_tokens, max_tokens)

    @property
    def is_full(self) -> bool:
        """Whether the next request would be refused, as the simulated engine does."""
        scheduler = self.timeline.scheduler
        free = 0 if scheduler.blocked else self.limits.max_batch_size - scheduler.running
        return len(scheduler.waiting) >= self._max_waiting + free

    def submit(self, sequence: SimSequence, now_s: float) -> Publication | None:
        """Let a sequence arrive; return the publication that says so, if it is a new one."""
        self.timeline.submit(sequence, now_s)
        self._committed_blocks += self._blocks(sequence)
        self._expected_tokens += sequence.expected_tokens
        opened = self._open_publication(now_s)
        self._publication.accepted.append(sequence.route_id)
        self._publication.events += self.timeline.scheduler.take_events()
        self._show()
        return opened

    def advance(self, now_s: float) -> tuple[list[Progress[SimSequence]], Publication | None]:
        """Do all that is due; return what happened, and the publication that says so, if it is a new one."""
        progress = self.timeline.advance(now_s)
        if not progress:
            return progress, None
        opened = self._open_publication(now_s)
        for moment in progress:
            self._publication.events += moment.events
            for sequence in moment.prefilled:
                if sequence.first_token_s == moment.at_s:  # not one that was preempted
                    self._count_prefill(sequence)
            for sequence in moment.finished:
                blocks = self._blocks(sequence)
                self._committed_blocks -= blocks
                self._released_blocks += blocks
        self._show()
        return progress, opened

    def _count_prefill(self, sequence: SimSequence) -> None:
        cached, computed = sequence.cached_tokens, sequence.prompt_tokens - sequence.cached_tokens
        self._prefilled_tokens += computed
        self._prefilled_pairs += computed * cached + computed * (computed + 1) * 0.5
        self._expected_tokens -= sequence.expected_tokens

    def _blocks(self, sequence: SimSequence) -> int:
        return -(-(sequence.prompt_tokens + sequence.max_tokens) // self.limits.tokens_per_block)

    def _open_publication(self, now_s: float) -> Publication | None:
        last = self._publication
        if now_s <= last.at_s and not last.is_sent:
            return None
        earliest_s = last.at_s + self._interval_s
        if last.goes_on:  # while it decodes, it publishes every `interval_s`
            earliest_s += (now_s - last.at_s) // self._interval_s * self._interval_s
        self._publication = Publication(self.number, max(now_s, earliest_s))
        return self._publication

    def _show(self) -> None:
        timeline = self.timeline
        scheduler = timeline.scheduler
        decoding = scheduler.decoding
        self._publication.show(
            LoadReport(
                running=len(scheduler.prefilling) + len(decoding),
                waiting=len(scheduler.waiting),
                queued_prefill_tokens=min(scheduler.queued_prefill_tokens, self._expected_tokens),
                used_blocks=scheduler.pool.used_blocks,
                total_blocks=self.limits.total_blocks,
                committed_blocks=self._committed_blocks,
                context_tokens=decoding.context_tokens,
                prefilled_tokens=self._prefilled_tokens,
                prefilled_pairs=self._prefilled_pairs,
                generated_tokens=decoding.total_tokens,
                steps=timeline.steps,
                busy_s=timeline.busy_s,
                released_blocks=self._released_blocks,
            ),
            timeline.decode_run,
        )
