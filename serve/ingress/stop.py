"""StopMatcher: finds stop strings in a text that arrives in pieces, and holds back what may become one. Pure.

The answer does not depend on where the pieces end: a stop string counts at the character that completes it, and of
several completed by the same character the longest counts.
"""

from collections.abc import Sequence


class StopMatcher:
    """The stop strings of one sequence. Time is linear in the text, whatever the strings are.

    Source: Knuth, Morris, Pratt, "Fast pattern matching in strings", 1977. The state for each string is the length of
    its longest prefix that the text ends with: what has to be held back is the longest of them.
    """

    __slots__ = ("_failures", "_firsts", "_held", "_states", "_stops", "matched")

    def __init__(self, stops: Sequence[str]) -> None:
        """Start a sequence.

        Args:
            stops: At least one string, none empty.
        """
        # The longest first: of several that end together it is found first.
        self._stops = sorted(set(stops), key=lambda stop: (-len(stop), stop))
        self._failures = [failure_function(stop) for stop in self._stops]
        self._firsts = frozenset(stop[0] for stop in self._stops)
        self._states = [0] * len(self._stops)
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Take the next piece; return what can be shown of all so far. After a match, sets `matched` and ignores more.

        The stop string itself is never part of what is returned.
        """
        if self.matched is not None:
            return ""
        if not self._held and self._firsts.isdisjoint(text):
            return text
        for position, char in enumerate(text):
            if (stop := self._step(char)) is not None:
                self.matched = stop
                shown = self._held + text[: position + 1]
                self._held = ""
                return shown[: len(shown) - len(stop)]
        shown = self._held + text
        keep = len(shown) - max(self._states)
        self._held = shown[keep:]
        return shown[:keep]

    def _step(self, char: str) -> str | None:
        found = None
        for index, stop in enumerate(self._stops):
            state, failure = self._states[index], self._failures[index]
            while state and stop[state] != char:
                state = failure[state - 1]
            if stop[state] == char:
                state += 1
            if state == len(stop):
                found = found or stop
                state = failure[state - 1]
            self._states[index] = state
        return found

    def flush(self) -> str:
        """Return what was held back; the text has ended without a stop string."""
        held, self._held = self._held, ""
        return held


def failure_function(pattern: str) -> list[int]:
    """Return, for each prefix of `pattern`, the length of its longest proper prefix that is also its suffix."""
    failure = [0] * len(pattern)
    state = 0
    for position in range(1, len(pattern)):
        while state and pattern[position] != pattern[state]:
            state = failure[state - 1]
        if pattern[position] == pattern[state]:
            state += 1
        failure[position] = state
    return failure
