"""Measured: what a request log says of the run that it comes from, to set the simulation against."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sim.metrics import Percentiles
from sim.workload import SimRequest


@dataclass(frozen=True)
class Measured:
    """Figures of the real run, at the gateway. Times in s.

    Attributes:
        requests: With a first token.
        ttft_s, tpot_s: Percentiles.
    """

    requests: int
    ttft_s: Percentiles
    tpot_s: Percentiles


def measured(requests: Sequence[SimRequest]) -> Measured | None:
    """Return what was measured; None if the workload does not come from a run."""
    known = [request for request in requests if request.measured_ttft_s > 0.0]
    if not known:
        return None
    ttft_s = np.array([request.measured_ttft_s for request in known])
    duration_s = np.array([request.measured_duration_s for request in known])
    gaps = np.array([request.output_tokens - 1 if request.output_tokens > 1 else np.nan for request in known])
    return Measured(len(known), Percentiles.of(ttft_s), Percentiles.of((duration_s - ttft_s) / gaps))
