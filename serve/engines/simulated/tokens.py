"""TokenSource: a language model without weights. The next token's logits are a function of all tokens before it.

So a sequence that continues elsewhere, from its prompt and what was generated, goes on as it would have. The state is a
polynomial rolling hash: a prompt costs one vectorised sum, a token one multiplication.
"""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
_BASE = 0xD1342543DE82EF95  # of the rolling hash; odd
_MIX = 0x9E3779B97F4A7C15
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # SplitMix64's finaliser: Steele, Lea, Flood, 2014

# Logits of a position: the likeliest tokens stand on a ladder, all others lie far below it. With these constants the
# likeliest token of a 128k vocabulary has probability 0.28.
LADDER = 20
_TOP, _RUNG = 5.0, 0.4
_FLOOR, _SPREAD = -6.0, 4.0


def mix64(value: int) -> int:
    """Scramble 64 bits."""
    value = ((value ^ (value >> 30)) * _M1) & _MASK
    value = ((value ^ (value >> 27)) * _M2) & _MASK
    return value ^ (value >> 31)


def unit(value: int) -> float:
    """Scramble 64 bits into a number in [0, 1)."""
    return (mix64(value) >> 11) * 2.0**-53


class TokenSource:
    """Deterministic logits over a vocabulary.

    Args:
        seed: Another seed is another model.
        vocab_size: Token ids are below this.
        first_id, last_id: The likely tokens are among these ids, both included; so special tokens can be left out.
    """

    def __init__(self, seed: int, vocab_size: int, first_id: int, last_id: int) -> None:
        self._seed = mix64(seed & _MASK) | 1
        self._first = first_id
        self._count = last_id - first_id + 1
        self.ladder_size = min(LADDER, self._count)
        self.ladder_logits = [_TOP - _RUNG * rung for rung in range(self.ladder_size)]
        ladder = sum(math.exp(logit) for logit in self.ladder_logits)
        rest = math.exp(_FLOOR) * (1.0 - math.exp(-_SPREAD)) / _SPREAD  # mean of exp(logit) of a token off the ladder
        self.log_total = math.log(ladder + (vocab_size - self.ladder_size) * rest)
        self._powers = np.ones(1, dtype=np.uint64)

    def state_after(self, token_ids: npt.NDArray[np.uint32]) -> int:
        """Return the state after a prompt, (num_tokens,)."""
        count = len(token_ids)
        if count >= len(self._powers):
            powers = np.full(2 * count, _BASE, dtype=np.uint64)
            powers[0] = 1
            self._powers = np.cumprod(powers, dtype=np.uint64)
        tokens = token_ids.astype(np.uint64) + np.uint64(1)
        return int(np.dot(tokens, self._powers[count - 1 :: -1] if count else self._powers[:0])) & _MASK

    def states(self, token_ids: npt.NDArray[np.uint32]) -> Iterator[int]:
        """Yield the state before each token of a prompt."""
        state = 0
        for token in token_ids.tolist():
            yield state
            state = (state * _BASE + token + 1) & _MASK

    @staticmethod
    def next_state(state: int, token_id: int) -> int:
        """Return the state after one more token."""
        return (state * _BASE + token_id + 1) & _MASK

    def ladder_token(self, state: int, rung: int) -> int:
        """Return the likeliest token (rung 0), the next one (rung 1), ...; rungs below the ladder exist, too."""
        scrambled = ((state ^ self._seed) * _MIX) & _MASK
        return self._first + (((scrambled >> 32) * self._count >> 32) + rung) % self._count

    def logit(self, state: int, token_id: int) -> float:
        """Return a token's raw logit."""
        rung = (token_id - self.ladder_token(state, 0)) % self._count
        if rung < self.ladder_size and self._first <= token_id < self._first + self._count:
            return self.ladder_logits[rung]
        return _FLOOR - _SPREAD * unit(state ^ self._seed ^ ((token_id + 1) * _MIX & _MASK))
