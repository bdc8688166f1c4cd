"""SteadyState: how an engine does under a steady load, from the durations of its steps. PURE.

Requests arrive at random, at a rate. A step gives each of the B sequences in the batch its next token, and computes the
prompts that have arrived since the last one. Everything follows from B: an output of O tokens stays for O - 1 steps, so
that n = B / (O - 1) prompts come with each step, the step takes T = T0(B) + n S, and the rate is n / T; T0 is the
duration of the step without prompts, S what one prompt adds.

A prompt waits for the rest of the present step, then for its own step with all the prompts that came meanwhile: a queue
with gated service, whose cycle is C = T0 + N S with N prompts of the last cycle. Mean and variance of C are exact,
percentiles are those of a gamma or normal distribution with that mean and variance; `benchmarks/plan_facts.py` holds
them against the simulator.

Sources: Little, "A proof for the queuing formula L = λW", 1961; Boxma, "Workloads and waiting times in single-server
systems with multiple customer classes", 1989, for gated service; Kelly, "Reversibility and stochastic networks", 1979,
for symmetric queues, whose number of customers does not depend on how service times are distributed; Wilson, Hilferty,
"The distribution of chi-square", 1931, for the percentile of a gamma distribution.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

from builders.plan.goal import Goal
from serve.engines.simulated.latency import StepShape
from serve.engines.simulated.roofline import RooflineLatency

# What gateway, router and one hop add to a first token; `benchmarks/gateway.py` holds it below this.
GATEWAY_S = 0.004
# Deviations are so many times what the formulas say: they leave out that busy times follow busy times. Fitted to
# the simulator.
_CLUSTERED = 1.25
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Limits:
    """What bounds a batch.

    Attributes:
        sequences: Sequences whose keys and values fit, and that a step may hold.
        step_tokens: Tokens of one step.
    """

    sequences: int
    step_tokens: int


@dataclass(frozen=True)
class SteadyState:
    """One engine under a steady load. Times in s.

    Attributes:
        rate_per_s: Requests a second.
        batch: Mean number of sequences in the batch.
        batch_deviation: Standard deviation of it.
        decode_s: T0, a step without prompts.
        prompt_s: S, what a prompt adds to its step.
        step_s: T, the mean step.
        prompts_per_step: n.
        tpot_s, tpot_mean_s: At the goal's percentile, and mean.
        ttft_s, ttft_mean_s: The same.
    """

    rate_per_s: float
    batch: float
    batch_deviation: float
    decode_s: float
    prompt_s: float
    step_s: float
    prompts_per_step: float
    tpot_s: float
    tpot_mean_s: float
    ttft_s: float
    ttft_mean_s: float

    @property
    def prefill_share(self) -> float:
        """Share of the time that prompts take."""
        return self.rate_per_s * self.prompt_s


class Load:
    """A goal's requests on one engine.

    Args:
        latency: Of the engine's steps.
        goal: For lengths, and percentile.
        limits: Of the engine.

    Attributes:
        output_tokens: Mean length of outputs.
        context: Mean tokens of a sequence in the batch.
    """

    def __init__(self, latency: RooflineLatency, goal: Goal, limits: Limits) -> None:
        self._latency, self._goal, self._limits = latency, goal, limits
        self.output_tokens = goal.output_tokens
        self._steps = goal.output_tokens - 1  # the first token comes with the prompt
        self._spread = 1.0 + goal.length_deviation**2  # E[x**2] / E[x]**2 of lengths
        # Of a sequence in the batch, on average: long outputs are there for longer.
        self.context = goal.input_tokens + goal.output_tokens * self._spread / 2
        self._computed = goal.computed_tokens
        cached = goal.input_tokens - self._computed
        self._pairs = self._computed * (cached + (self._computed * self._spread + 1) / 2)
        self._z = _NORMAL.inv_cdf(goal.percentile / 100.0)

    @cached_property
    def idle(self) -> SteadyState:
        """One request alone: no load is faster."""
        return self.state(0.0)

    @cached_property
    def largest_batch(self) -> float:
        """Mean number of sequences that can be in the batch, all places being taken as soon as they are free."""
        per_sequence = 1.0 + self._computed / self._steps  # tokens of a step for each
        return max(0.0, min(float(self._limits.sequences), self._limits.step_tokens / per_sequence))

    @cached_property
    def saturated(self) -> SteadyState:
        """All requests waiting at once: no rate is higher. Its TTFT says nothing."""
        return self.state(self.largest_batch)

    def most(self, ttft_s: float | None, tpot_s: float | None) -> SteadyState | None:
        """Return the highest load of random arrivals that meets the limits; None: not even one request does."""

        def good(state: SteadyState) -> bool:
            return (
                (ttft_s is None or state.ttft_s <= ttft_s)
                and (tpot_s is None or state.tpot_s <= tpot_s)
                and state.batch + self._z * state.batch_deviation <= self.largest_batch
            )

        if self.largest_batch < 1.0 or not good(self.idle):
            return None
        return self._search(good)

    def at(self, rate_per_s: float) -> SteadyState:
        """Return the state at a rate that is not above the saturated one."""
        return self._search(lambda state: state.rate_per_s <= rate_per_s)

    def _search(self, good: Callable[[SteadyState], bool]) -> SteadyState:
        """Return the state with the largest batch that is good; smaller ones are."""
        low, high = 0.0, self.largest_batch
        best = self.idle
        for _ in range(40):
            batch = (low + high) / 2
            state = self.state(batch)
            if good(state):
                low, best = batch, state
            else:
                high = batch
            if high - low <= 1e-4 * high:
                break
        return best

    def state(self, batch: float) -> SteadyState:
        """Return the state with a mean of `batch` >= 0 sequences in the batch."""
        decode_s = self._decode_s(max(batch, 1.0))
        sequences_deviation, step_deviation_s = self._batch_deviation(batch, decode_s)
        prompts = batch / self._steps
        prompt_s = self._prompt_s(batch, prompts)
        step_s = decode_s + prompts * prompt_s
        rate = prompts / step_s
        tpot_mean_s = step_s
        ttft_mean_s, ttft_s = self._ttft(batch, decode_s, prompt_s, rate, step_deviation_s)
        tpot_deviation_s = self._tpot_deviation(batch, decode_s, prompt_s, rate, step_deviation_s)
        return SteadyState(
            rate_per_s=rate,
            batch=batch,
            batch_deviation=sequences_deviation,
            decode_s=decode_s,
            prompt_s=prompt_s,
            step_s=step_s,
            prompts_per_step=prompts,
            tpot_s=tpot_mean_s + self._z * tpot_deviation_s,
            tpot_mean_s=tpot_mean_s,
            ttft_s=ttft_s,
            ttft_mean_s=ttft_mean_s,
        )

    # Steps

    def _decode_s(self, batch: float) -> float:
        return self._latency.step_s(self._shape(batch, 0.0, 0.0))

    def _shape(self, batch: float, prompts: float, chunk: float) -> StepShape:
        """Return a step with the share `chunk` of so many prompts."""
        # Not whole: these are means, which the latency model takes as they are.
        return StepShape(
            prefill_tokens=prompts * self._computed * chunk,  # type: ignore[arg-type]
            prefill_pairs=prompts * self._pairs * chunk,
            prefill_ends=prompts,  # type: ignore[arg-type]
            decode_sequences=batch,  # type: ignore[arg-type]
            decode_context_tokens=batch * self.context,  # type: ignore[arg-type]
        )

    def _prompt_s(self, batch: float, prompts: float) -> float:
        """Return what each prompt adds to its step; a long one is computed in several.

        Part of the first prompt's products is hidden behind the reading of weights, which the sequences of the batch
        wait for anyway; those of the others in the same step are not.
        """
        together = prompts / -math.expm1(-prompts) if prompts else 1.0  # in steps that have any, on average
        chunks = self._chunks(batch)
        with_prompts = self._latency.step_s(self._shape(batch, together, 1.0 / chunks))
        without = self._decode_s(batch) if batch else 0.0
        return chunks * (with_prompts - without) / together

    def _chunks(self, batch: float) -> int:
        room = max(1.0, self._limits.step_tokens - batch)
        return math.ceil(self._computed / room)

    # Percentiles

    def _batch_deviation(self, batch: float, decode_s: float) -> tuple[float, float]:
        """Return the standard deviation of the number of sequences, and of the step without prompts with it.

        Sequences share a processor that slows down the more there are, so they vary more than a Poisson number: around
        the mean B like a normal number of variance B / (1 - b), b being the elasticity of the step's duration.
        """
        if not batch:
            return 0.0, 0.0
        slope_s = max(0.0, (self._decode_s(batch * 1.01 + 1.0) - decode_s) / (batch * 0.01 + 1.0))
        elasticity = min(0.9, slope_s * batch / decode_s)
        sequences = math.sqrt(batch / (1.0 - elasticity))
        return sequences, slope_s * sequences

    def _tpot_deviation(
        self, batch: float, decode_s: float, prompt_s: float, rate: float, step_deviation_s: float
    ) -> float:
        """Return the standard deviation of requests' TPOT: by prompts that come, and by the size of the batch."""
        if not batch:
            return 0.0
        step_s = decode_s + batch / self._steps * prompt_s
        comers = rate * self._steps * step_s  # prompts during one output
        # Once for the lengths of these prompts, once for that of the output: short ones vary more. Prompts lengthen the
        # time in which more of them come; and when many come, many are in the batch soon, so that both are added.
        by_prompts = prompt_s * math.sqrt(comers) * self._spread / self._steps
        return _CLUSTERED * (by_prompts + step_deviation_s) * step_s / decode_s

    def _ttft(
        self, batch: float, decode_s: float, prompt_s: float, rate: float, step_deviation_s: float
    ) -> tuple[float, float]:
        """Return mean and percentile of the TTFT."""
        busy = -math.expm1(-batch)  # probability that there is a step to wait for
        used = min(0.999, rate * prompt_s)
        cycle_s = decode_s / (1.0 - used) if batch else 0.0
        cycle_variance = rate * cycle_s * prompt_s**2 * self._spread / (1.0 - used**2)
        seen_s = cycle_s + (cycle_variance / cycle_s if cycle_s else 0.0)  # the cycle that an arrival falls into
        others_s = busy * rate * seen_s * prompt_s
        own_s = self._latency.stages * prompt_s  # a prompt passes the stages one after the other
        mean_s = busy * seen_s / 2 + others_s + own_s + busy * self._chunks(batch) * decode_s
        # A long cycle has both a long rest and many prompts, and comes of a large batch, so these vary together.
        rest = math.sqrt(busy * (seen_s**2 / 12 + cycle_variance / 4))
        others = math.sqrt(busy * rate * seen_s * self._spread) * prompt_s
        own = own_s * self._goal.length_deviation
        by_batch = 1.5 * step_deviation_s
        variance = (_CLUSTERED * (rest + others + by_batch)) ** 2 + own**2
        return GATEWAY_S + mean_s, GATEWAY_S + gamma_percentile(mean_s, variance, self._z)


def gamma_percentile(mean: float, variance: float, z: float) -> float:
    """Return a percentile of a gamma distribution.

    Args:
        mean: Of it.
        variance: Of it.
        z: The same percentile of the normal distribution.
    """
    if variance <= 0.0 or mean <= 0.0:
        return mean
    shape = mean**2 / variance
    third = 1.0 / (9.0 * shape)
    return mean * max(1.0 - third + z * math.sqrt(third), 0.0) ** 3
