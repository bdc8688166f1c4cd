"""Summary: the figures of one simulation.

| figure | formula |
|---|---|
| hit rate | cached prompt tokens / prompt tokens of the requests that were served |
| TTFT | from arrival to the first token, at the gateway |
| TPOT | from the first token to the last / (output tokens - 1), of outputs of two tokens or more |
| queue | waiting in the gateway, and from the engine taking the request to its first step |
| goodput | requests that met both limits of the SLO, per second of arrivals; and as a share of all, refused ones too |
| spread | maximum / mean over the replicas |
| cost | GPUs * time from the first arrival to the last token / output tokens |
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sim.outcome import Column, Outcome
from sim.slo import Slo


@dataclass(frozen=True)
class Percentiles:
    """Of a column, in its unit; NaN if it is empty."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, column: Column) -> "Percentiles":
        """Take them; NaN are left out."""
        known = column[np.isfinite(column)]
        if not len(known):
            return cls(np.nan, np.nan, np.nan)
        return cls(*np.percentile(known, [50, 90, 99]).tolist())


@dataclass(frozen=True)
class Summary:
    """Figures of one policy on one fleet. Times in s.

    Attributes:
        policy: Its name and parameters.
        replicas: How many there were.
        requests, finished, refused: Counts.
        hit_rate: Share of prompt tokens that were cached.
        ttft_s, tpot_s, queue_s: Percentiles.
        ttft_mean_s: Mean.
        goodput_per_s: Requests a second that met the SLO.
        goodput_share: Of all requests.
        spread_requests, spread_prefill, spread_busy: Maximum / mean over replicas of requests, computed prompt tokens
            and busy time; 1 is balance.
        utilisation: Mean share of the time that engines were busy.
        requests_per_s, output_tokens_per_s: Throughput, from the first arrival to the last token.
        gpu_s_per_1k_tokens: GPU-seconds for a thousand output tokens.
        dollars_per_1m_tokens: For a million output tokens; NaN without a price.
        duration_s: From the first arrival to the last token.
        prediction_error: Median of |predicted / real TTFT - 1|; NaN if the policy does not predict it.
        wall_s: How long the simulation took; 0 if unknown.
    """

    policy: str
    replicas: int
    requests: int
    finished: int
    refused: int
    hit_rate: float
    ttft_s: Percentiles
    tpot_s: Percentiles
    queue_s: Percentiles
    ttft_mean_s: float
    goodput_per_s: float
    goodput_share: float
    spread_requests: float
    spread_prefill: float
    spread_busy: float
    utilisation: float
    requests_per_s: float
    output_tokens_per_s: float
    gpu_s_per_1k_tokens: float
    dollars_per_1m_tokens: float
    duration_s: float
    prediction_error: float
    wall_s: float = 0.0


def summarize(
    outcome: Outcome,
    policy: str,
    slo: Slo,
    *,
    gpus_per_replica: int = 1,
    gpu_dollars_per_hour: float | None = None,
    wall_s: float = 0.0,
) -> Summary:
    """Compute the figures of an outcome."""
    served = outcome.served
    replicas, duration_s = len(outcome.busy_s), outcome.end_of_all_s
    output_tokens = int(outcome.output_tokens[served].sum())
    computed = (outcome.prompt_tokens - outcome.cached_tokens)[served]
    met = int(meets(outcome, slo).sum())
    arrivals_s = float(outcome.arrival_s[-1]) if len(outcome.arrival_s) else 0.0
    gpu_s = replicas * gpus_per_replica * duration_s
    price = gpu_dollars_per_hour if gpu_dollars_per_hour is not None else np.nan
    return Summary(
        policy=policy,
        replicas=replicas,
        requests=len(served),
        finished=int(np.isfinite(outcome.end_s).sum()),
        refused=int((~served).sum()),
        hit_rate=_ratio(float(outcome.cached_tokens[served].sum()), float(outcome.prompt_tokens[served].sum())),
        ttft_s=Percentiles.of(outcome.ttft_s),
        tpot_s=Percentiles.of(outcome.tpot_s),
        queue_s=Percentiles.of(outcome.queue_s),
        ttft_mean_s=float(np.nanmean(outcome.ttft_s)) if served.any() else np.nan,
        goodput_per_s=_ratio(met, arrivals_s or duration_s),
        goodput_share=_ratio(met, len(served)),
        spread_requests=spread(np.bincount(outcome.replica[served], minlength=replicas).astype(np.float64)),
        spread_prefill=spread(
            np.bincount(outcome.replica[served], weights=computed, minlength=replicas).astype(np.float64)
        ),
        spread_busy=spread(outcome.busy_s),
        utilisation=_ratio(float(outcome.busy_s.mean()), duration_s),
        requests_per_s=_ratio(int(served.sum()), duration_s),
        output_tokens_per_s=_ratio(output_tokens, duration_s),
        gpu_s_per_1k_tokens=_ratio(gpu_s, output_tokens / 1e3),
        dollars_per_1m_tokens=_ratio(gpu_s / 3600.0 * price, output_tokens / 1e6),
        duration_s=duration_s,
        prediction_error=_prediction_error(outcome),
        wall_s=wall_s,
    )


def meets(outcome: Outcome, slo: Slo) -> npt.NDArray[np.bool_]:
    """Return for each request whether it met the SLO. Refused ones did not; an output of one token has no TPOT."""
    ttft_s, tpot_s = outcome.ttft_s, outcome.tpot_s
    return (ttft_s <= slo.ttft_ms * 1e-3) & (np.isnan(tpot_s) | (tpot_s <= slo.tpot_ms * 1e-3))


def spread(column: Column) -> float:
    """Return maximum / mean; 1 if nothing is there."""
    mean = float(column.mean())
    return float(column.max()) / mean if mean > 0.0 else 1.0


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else np.nan


def _prediction_error(outcome: Outcome) -> float:
    error = np.abs(outcome.predicted_ttft_s / outcome.ttft_s - 1.0)
    known = error[np.isfinite(error)]
    return float(np.median(known)) if len(known) else np.nan
