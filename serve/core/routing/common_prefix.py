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
        if len(self._recent) < 4 or not len(hashes):
            return 0
        alike = [other for other in self._recent if len(other) and other[0] == hashes[0]]
        if len(alike) < wanted:
            return 0
        # By bisection: equal hashes mean equal prefixes.
        low, high = 1, len(hashes)
        while low < high:
            middle = (low + high + 1) >> 1
            still_alike = [other for other in alike if len(other) >= middle and other[middle - 1] == hashes[middle - 1]]
            if len(still_alike) >= wanted:
                low, alike = middle, still_alike
            else:
                high = middle - 1
        return low
