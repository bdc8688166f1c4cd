"""The load of a test: prompts of real token ids, and lengths that vary around their means. PURE."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from serve.errors import ConfigError

_SPREAD = 0.5  # lengths are even over the mean, less or more by this share
_SEPARATE = 2**31  # seeds of the lengths and of the contents


@dataclass(frozen=True)
class LoadShape:
    """Means of the lengths, in tokens."""

    prompt_tokens: int
    output_tokens: int

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return int((1 + _SPREAD) * self.prompt_tokens) + int((1 + _SPREAD) * self.output_tokens)


@dataclass(frozen=True)
class LoadRequest:
    """One request: a prompt, and how many tokens are generated, whatever they are."""

    prompt: tuple[int, ...]
    output_tokens: int


class LoadSource:
    """Draws requests; the same seed draws the same ones.

    A prompt is a part of the texts, joined to one ring, from a place of its own: words as they follow each other, and
    seldom two prompts with the same beginning.

    Args:
        shape: Means of the lengths.
        ring: Token ids of the texts.
        room: Tokens that one sequence can have; longer requests are cut.
        seed: Of the draws.

    Raises:
        ConfigError: A request of mean length does not fit.
    """

    def __init__(self, shape: LoadShape, ring: Sequence[int], room: int, seed: int) -> None:
        if shape.prompt_tokens + shape.output_tokens > room:
            raise ConfigError(
                f"tune.prompt_tokens={shape.prompt_tokens} and tune.output_tokens={shape.output_tokens} do not fit "
                f"{room} tokens, the engine's context or KV cache; lower them to what your requests have"
            )
        if not ring:
            raise ValueError("there are no texts")
        self._shape, self._ring, self._room = shape, tuple(ring), room
        self._lengths, self._places = random.Random(seed), random.Random(seed + _SEPARATE)

    def draw(self) -> LoadRequest:
        """Return the next request."""
        prompt = self._length(self._shape.prompt_tokens)
        output = self._length(self._shape.output_tokens)
        output = min(output, self._room - 1)
        return LoadRequest(self._cut(min(prompt, self._room - output)), output)

    def _length(self, mean: int) -> int:
        return max(1, round(mean * self._lengths.uniform(1 - _SPREAD, 1 + _SPREAD)))

    def _cut(self, length: int) -> tuple[int, ...]:
        start = self._places.randrange(len(self._ring))
        rounds = -(-(start + length) // len(self._ring))
        return (self._ring * rounds)[start : start + length]
