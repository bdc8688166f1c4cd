"""Sampler: SamplingParams applied to the logits of a TokenSource, one token after the other."""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from hashlib import blake2b
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from serve.core.request import SamplingParams, TokenLogprob
from serve.engines.simulated.tokens import TokenSource, mix64, unit


def draw_seed(sampling: SamplingParams, request_id: str) -> int:
    """Return the seed of a request's draws. Without one of its own, each request gets another one, from its id."""
    if sampling.seed is not None:
        return mix64(sampling.seed & ((1 << 64) - 1))
    return int.from_bytes(blake2b(request_id.encode(), digest_size=8).digest(), "little")


class Sampler:
    """The tokens of one sequence.

    Args:
        source: The model.
        sampling: How to choose.
        prompt: Token ids, (prompt_tokens,).
        seed: Of the draws (`draw_seed`).
        stop_hazard: Probability that a token, where one may stop, is the first of `stop_token_ids`.

    Attributes:
        state: The source's state before the next token.
    """

    def __init__(
        self,
        source: TokenSource,
        sampling: SamplingParams,
        prompt: npt.NDArray[np.uint32],
        seed: int,
        stop_hazard: float = 0.0,
    ) -> None:
        self.source = source
        self._sampling = sampling
        self._seed = seed
        self._stops = frozenset(sampling.stop_token_ids)
        self._hazard = stop_hazard if sampling.stop_token_ids else 0.0
        self.state = source.state_after(prompt)
        self._produced = 0
        self._output: Counter[int] | None = None  # counted only if a penalty wants it
        self._prompt: frozenset[int] = frozenset()
        if sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0:
            self._output = Counter()
            if sampling.repetition_penalty != 1.0:
                self._prompt = frozenset(np.unique(prompt).tolist())
        self._adjusts = bool(self._output is not None or sampling.logit_bias)
        self._is_plain = not (
            sampling.temperature or self._adjusts or self._hazard or (self._stops and sampling.min_tokens)
        )
        self._cumulative = None if self._adjusts or sampling.temperature == 0.0 else self._plain_distribution()

    def is_stop(self, token_id: int) -> bool:
        """Return whether a token ends the sequence."""
        return token_id in self._stops

    def next(self) -> int:
        """Choose the next token. After a stop token there is no other."""
        state = self.state
        if self._is_plain:  # greedy, with nothing to apply: what load tests ask for
            token = self.source.ladder_token(state, 0)
            self.state = self.source.next_state(state, token)
            return token
        if self._hazard and self._produced >= self._sampling.min_tokens and unit(state ^ 0x5709) < self._hazard:
            return self._sampling.stop_token_ids[0]
        token = self._choose(state)
        if token in self._stops and self._produced < self._sampling.min_tokens:
            token = self._choose_among(state, self._stops)
        self.state = self.source.next_state(state, token)
        self._produced += 1
        if self._output is not None:
            self._output[token] += 1
        return token

    def _choose(self, state: int) -> int:
        if self._adjusts:
            return self._choose_among(state, frozenset())
        if self._cumulative is None:
            return self.source.ladder_token(state, 0)
        point = unit(state ^ self._seed) * self._cumulative[-1]
        return self.source.ladder_token(state, min(bisect_right(self._cumulative, point), len(self._cumulative) - 1))

    def _plain_distribution(self) -> list[float]:
        """Return the cumulative weights of the rungs that temperature and filters leave: the same at each position."""
        weights = _filtered(list(enumerate(self.source.ladder_logits)), self._sampling)
        return list(accumulate(weight for _, weight in weights))

    def _choose_among(self, state: int, masked: frozenset[int]) -> int:
        logits = [pair for pair in self._adjusted(state, masked).items() if pair[0] not in masked]
        if self._sampling.temperature == 0.0:
            return max(logits, key=lambda pair: (pair[1], -pair[0]))[0]
        weights = _filtered(logits, self._sampling)
        cumulative = list(accumulate(weight for _, weight in weights))
        chosen = bisect_right(cumulative, unit(state ^ self._seed) * cumulative[-1])
        return weights[min(chosen, len(weights) - 1)][0]

    def _adjusted(self, state: int, masked: frozenset[int]) -> dict[int, float]:
        """Return penalised and biased logits of every token that could be chosen."""
        sampling, source = self._sampling, self.source
        output: Mapping[int, int] = self._output or {}
        touched = {*sampling.logit_bias, *output, *self._prompt}
        # The likeliest tokens that nothing touches, and all that something touches: the others cannot win.
        tokens, rung, untouched = set(touched), 0, 0
        while untouched < source.ladder_size and rung < source.ladder_size + len(touched) + len(masked):
            token = source.ladder_token(state, rung)
            untouched += token not in touched and token not in masked
            tokens.add(token)
            rung += 1
        logits = {}
        for token in tokens:
            logit = source.logit(state, token)
            count = output.get(token, 0)
            if count or token in self._prompt:
                penalty = sampling.repetition_penalty
                logit = logit / penalty if logit > 0 else logit * penalty
            if count:
                logit -= sampling.presence_penalty + count * sampling.frequency_penalty
            logits[token] = logit + sampling.logit_bias.get(token, 0.0)
        return logits


def _filtered(logits: list[tuple[int, float]], sampling: SamplingParams) -> list[tuple[int, float]]:
    """Apply temperature, top_k, top_p and min_p. Returns (token, weight relative to the likeliest), likeliest first."""
    ordered = sorted(logits, key=lambda pair: (-pair[1], pair[0]))
    top = ordered[0][1]
    weights = [(token, math.exp((logit - top) / sampling.temperature)) for token, logit in ordered]
    if sampling.top_k:
        weights = weights[: sampling.top_k]
    if sampling.top_p < 1.0:
        target = sampling.top_p * sum(weight for _, weight in weights)
        sums = accumulate(weight for _, weight in weights)
        weights = weights[: 1 + sum(1 for total in sums if total < target)]
    return [pair for pair in weights if pair[1] >= sampling.min_p]


def describe(source: TokenSource, state: int, token_id: int, count: int) -> TokenLogprob:
    """Return the raw log probability of a token in a state, and those of the `count` likeliest."""
    total = source.log_total
    top = tuple(
        (source.ladder_token(state, rung), source.ladder_logits[rung] - total)
        for rung in range(min(count, source.ladder_size))
    )
    return TokenLogprob(token_id, source.logit(state, token_id) - total, top)
