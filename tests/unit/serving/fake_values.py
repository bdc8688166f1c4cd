"""KeyValues in a dictionary."""

from collections.abc import Sequence


class FakeValues:
    """KeyValues.

    Attributes:
        values: What is kept.
        broken: Whether every call fails.
    """

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.broken = False

    def put(self, key: str, value: bytes) -> None:
        """Write a value."""
        self._check()
        self.values[key] = value

    def get(self, key: str) -> bytes | None:
        """Read a value."""
        self._check()
        return self.values.get(key)

    def delete(self, key: str) -> None:
        """Remove a value."""
        self._check()
        self.values.pop(key, None)

    def keys(self, prefix: str) -> Sequence[str]:
        """Return the keys that begin with a prefix."""
        self._check()
        return [key for key in self.values if key.startswith(prefix)]

    def _check(self) -> None:
        if self.broken:
            raise RuntimeError("the control service does not answer")
