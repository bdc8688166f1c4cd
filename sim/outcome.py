"""Outcome: what became of every request, and what every replica did. Columns; row i is the workload's request i."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Column = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Outcome:
    """Result of one simulation. Times are in s of virtual time; NaN where there is none.

    Attributes:
        arrival_s: (requests,) at the gateway.
        first_token_s, end_s: (requests,) at the gateway.
        queue_s: (requests,) waiting in the gateway, and then in the engine.
        prompt_tokens, cached_tokens, output_tokens: (requests,).
        predicted_ttft_s: (requests,) by the policy, where it predicts it.
        replica: (requests,) that served it; -1: refused.
        attempts: (requests,) replicas that were asked.
        busy_s: (replicas,).
        steps: (replicas,).
        end_of_all_s: When the last request ended.
    """

    arrival_s: Column
    first_token_s: Column
    end_s: Column
    queue_s: Column
    prompt_tokens: Numbers
    cached_tokens: Numbers
    output_tokens: Numbers
    predicted_ttft_s: Column
    replica: Numbers
    attempts: Numbers
    busy_s: Column
    steps: Numbers
    end_of_all_s: float

    @property
    def served(self) -> npt.NDArray[np.bool_]:
        """(requests,) whether it was served."""
        return self.replica >= 0

    @property
    def ttft_s(self) -> Column:
        """(requests,)."""
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> Column:
        """(requests,) NaN for outputs of one token."""
        gaps = np.where(self.output_tokens > 1, self.output_tokens - 1, np.nan)
        return (self.end_s - self.first_token_s) / gaps
