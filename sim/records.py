"""Records: what is noted of every request while a simulation runs."""

import math
from collections.abc import Sequence

import numpy as np

from sim.outcome import Outcome
from sim.replica import SimReplica, SimSequence
from sim.workload import SimRequest


class Records:
    """Plain lists, one entry a request, because arrays are slow to write one by one.

    Args:
        requests: The workload.

    Attributes:
        predicted_s, replica, attempts: As in `Outcome`.
    """

    def __init__(self, requests: Sequence[SimRequest]) -> None:
        count = len(requests)
        self._requests = requests
        self._first_token_s = [math.nan] * count
        self._end_s = [math.nan] * count
        self._queue_s = [0.0] * count
        self._cached = [0] * count
        self.predicted_s = [math.nan] * count
        self.replica = [-1] * count
        self.attempts = [0] * count

    def waited(self, number: int, wait_s: float) -> None:
        """A request has waited in its gateway."""
        self._queue_s[number] = wait_s

    def first_token(self, sequence: SimSequence, seen_s: float) -> None:
        """A gateway sees a request's first token."""
        number = sequence.number
        self._first_token_s[number] = seen_s
        self._queue_s[number] += sequence.started_s - sequence.arrived_s
        self._cached[number] = sequence.cached_tokens

    def end(self, sequence: SimSequence, seen_s: float) -> None:
        """A gateway sees a request's last token."""
        self._end_s[sequence.number] = seen_s

    def outcome(self, replicas: Sequence[SimReplica]) -> Outcome:
        """Return what became of all."""
        requests, end_s = self._requests, np.array(self._end_s)
        return Outcome(
            arrival_s=np.array([request.arrival_s for request in requests], dtype=np.float64),
            first_token_s=np.array(self._first_token_s),
            end_s=end_s,
            queue_s=np.where(np.array(self.replica) >= 0, self._queue_s, math.nan),
            prompt_tokens=np.array([request.prompt_tokens for request in requests], dtype=np.int64),
            cached_tokens=np.array(self._cached, dtype=np.int64),
            output_tokens=np.array([request.output_tokens for request in requests], dtype=np.int64),
            predicted_ttft_s=np.array(self.predicted_s),
            replica=np.array(self.replica, dtype=np.int64),
            attempts=np.array(self.attempts, dtype=np.int64),
            busy_s=np.array([replica.timeline.busy_s for replica in replicas]),
            steps=np.array([replica.timeline.steps for replica in replicas], dtype=np.int64),
            end_of_all_s=float(np.nanmax(end_s)) if np.isfinite(end_s).any() else 0.0,
        )
