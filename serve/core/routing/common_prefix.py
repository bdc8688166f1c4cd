"""CommonPrefix: how much of a prompt most of the recent requests began with, too.

A system prompt that everybody shares is no reason to send everybody to the replica that got it first: every replica
will have it in a moment, if requests are let go there.
"""

from collections import deque
from collections.abc import Sequence


class CommonPrefix:
    """The latest prompts of one model.

    Args:
        size: How many are remembered.
    """

    def __init__(self, size: int = 32) -> None:
        self._recent: deque[Sequence[int]] = deque(maxlen=size)

    def add(self, hashes: Sequence[int]) -> None:
        """Remember a prompt."""
        self._recent.append(hashes)

    def depth(self, hashes: Sequence[int], share: float = 0.5) -> int:
        """Return how many leading blocks of a prompt at least `share` of the remembered ones have."""
        wanted = max(2, int(share * len(self._recent)))
        if len(self._recent) < 4:
            return 0
        shared = sorted((shared_blocks(hashes, other) for other in self._recent), reverse=True)
        return shared[wanted - 1]


def shared_blocks(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many leading blocks two chains share. By bisection: equal hashes mean equal prefixes."""
    low, high = 0, min(len(one), len(other))
    if not high or one[0] != other[0]:
        return 0
    low = 1
    while low < high:
        middle = (low + high + 1) >> 1
        if one[middle - 1] == other[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
