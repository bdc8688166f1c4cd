"""TopLabels: which names get a label of their own in metrics, when anyone can invent names.

A label is for ever to a time-series database, so their number is bounded; and a counter must not fall, so what was
counted under one label is never moved to another. The busiest names have labels: one that has become twice as busy as
the least busy of those that have one takes its place.
"""

from collections import Counter

OTHER = "other"


class TopLabels:
    """Names that have labels now.

    Args:
        size: How many, besides `OTHER`.
    """

    def __init__(self, size: int = 20) -> None:
        self._size = size
        self._busy: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()  # those without a label, the busiest of them at least
        self.retired: list[str] = []

    def label(self, name: str) -> str:
        """Count one more of a name, and return its label. `retired` names those that have just lost theirs."""
        if name in self._busy or len(self._busy) < self._size:
            self._busy[name] += 1
            return name
        self._waiting[name] += 1
        least, count = min(self._busy.items(), key=lambda item: item[1])
        if self._waiting[name] >= 2 * count:
            self._busy[name] = self._waiting.pop(name)
            self._waiting[least] = self._busy.pop(least)
            self.retired.append(least)
            return name
        if len(self._waiting) > 8 * self._size:  # forget the rarer half: whoever is busy comes back
            self._waiting = Counter(dict(self._waiting.most_common(4 * self._size)))
        return OTHER
