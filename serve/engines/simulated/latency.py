"""How long a step of the batch takes: a protocol, and the model with fixed rates."""

import math
from typing import NamedTuple, Protocol


class StepShape(NamedTuple):
    """Work of one step.

    Attributes:
        prefill_tokens: Prompt tokens computed.
        prefill_pairs: (query, key) pairs of their causal attention: for a chunk of c tokens after s others,
            c * s + c * (c + 1) / 2.
        prefill_ends: Prompts that are completed, each of which yields a token.
        decode_sequences: Sequences that get their next token.
        decode_context_tokens: Tokens whose keys and values these read, summed over them.
    """

    prefill_tokens: int = 0
    prefill_pairs: float = 0.0
    prefill_ends: int = 0
    decode_sequences: int = 0
    decode_context_tokens: int = 0


class LatencyModel(Protocol):
    """Duration of steps. For a given number of sequences it should be affine in `decode_context_tokens`."""

    def step_s(self, shape: StepShape) -> float:
        """Return how long the step takes."""


class FixedLatency:
    """Constant rates, whatever the batch: for load tests in which the engine is not the subject.

    Args:
        prefill_tokens_per_s: > 0; `math.inf` computes prompts in no time.
        decode_step_s: >= 0; what each step takes in which a sequence is decoded.
        overhead_s: >= 0; added to every step.
    """

    def __init__(self, prefill_tokens_per_s: float, decode_step_s: float, overhead_s: float = 0.0) -> None:
        self._prefill_token_s = 1.0 / prefill_tokens_per_s
        self._decode_step_s = decode_step_s
        self._overhead_s = overhead_s

    def step_s(self, shape: StepShape) -> float:
        decode_s = self._decode_step_s if shape.decode_sequences else 0.0
        return self._overhead_s + shape.prefill_tokens * self._prefill_token_s + decode_s


class DecodeRun(NamedTuple):
    """Consecutive decode steps of the same sequences: the first takes `first_s`, each further one `slope_s` more."""

    steps: int
    first_s: float
    slope_s: float

    def duration_s(self, steps: int) -> float:
        """Return how long the first `steps` steps take together."""
        return steps * self.first_s + self.slope_s * (steps * (steps - 1) * 0.5)

    def steps_within(self, budget_s: float) -> int:
        """Return how many steps end within `budget_s` of the start."""
        if self.duration_s(self.steps) <= budget_s:
            return self.steps
        if budget_s < self.first_s:
            return 0
        # The root of a quadratic, in the form that does not cancel when the slope is tiny.
        linear = self.first_s - 0.5 * self.slope_s
        root = math.sqrt(max(0.0, linear * linear + 2.0 * self.slope_s * budget_s))
        steps = max(0, min(int(2.0 * budget_s / (root + linear)), self.steps - 1))
        while steps and self.duration_s(steps) > budget_s:  # rounding
            steps -= 1
        while self.duration_s(steps + 1) <= budget_s:
            steps += 1
        return steps


def decode_run(latency: LatencyModel, sequences: int, context_tokens: int, steps: int) -> DecodeRun:
    """Return the course of `steps` >= 1 decode steps, between which each sequence's context grows by one token.

    Exact where the duration is affine in the context; elsewhere it is interpolated between first and last step.
    """
    first_s = latency.step_s(StepShape(decode_sequences=sequences, decode_context_tokens=context_tokens))
    if steps == 1:
        return DecodeRun(1, first_s, 0.0)
    last_tokens = context_tokens + sequences * (steps - 1)
    last_s = latency.step_s(StepShape(decode_sequences=sequences, decode_context_tokens=last_tokens))
    return DecodeRun(steps, first_s, (last_s - first_s) / (steps - 1))
