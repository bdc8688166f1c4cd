"""CommonPrefix: how much of a prompt most of the recent requests began with, too.

A system prompt that everybody shares is no reason to send everybody to the replica that got it first: every replica
will have it in a moment, if requests are let go there.
"""

from collections import deque
from collections.abc import Sequence

from serve.core.blocks import Hashes


class CommonPrefix:
    """The latest prompts of one model. A prompt that goes on where another ended takes its place.

    So a conversation counts once, however many turns it has: what one user says again and again is no system prompt,
    and is best sent to where it already is.

    Args:
        size: How many are remembered.
    """

    def __init__(self, size: int = 32) -> None:
        self._recent: deque[Sequence[int] | Hashes] = deque(maxlen=size)

    def add(self, hashes: Sequence[int] | Hashes) -> None:
        """Remember a prompt."""
        recent, length = self._recent, len(hashes)
        for number in range(len(recent) - 1, -1, -1):
            before = len(recent[number])
            if 0 < before < length and recent[number][-1] == hashes[before - 1]:
                del recent[number]
                break
        recent.append(hashes)

    def depth(self, hashes: Sequence[int] | Hashes, share: float = 0.5) -> int:
        """Return how many leading blocks of a prompt at least `share` of the remembered ones have."""
        wanted = max(2, int(share * len(self._recent)))
        if len(self._recent) < 4 or not len(hashes):
            return 0
        alike = [other for other in self._recent if len(other) and other[0] == hashes[0]]
        if len(alike) < wanted:
            return 0
        # By galloping, because little of a long prompt is shared by many: equal hashes mean equal prefixes.
        low, high, step = 1, len(hashes), 1
        while low < high:
            middle = min(low + step, high)
            block = hashes[middle - 1]
            still_alike = [other for other in alike if len(other) >= middle and other[middle - 1] == block]
            if len(still_alike) >= wanted:
                low, alike, step = middle, still_alike, 2 * step
            else:
                high, step = middle - 1, max(1, (middle - 1 - low) >> 1)
        return low
