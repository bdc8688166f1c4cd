"""Small values that every process of a Ray cluster can read, kept by Ray's own control service."""

from collections.abc import Sequence
from typing import Protocol

from ray.experimental import internal_kv

_NAMESPACE = "raytrt"


class KeyValues(Protocol):
    """A map of texts to bytes. Calls block for milliseconds."""

    def put(self, key: str, value: bytes) -> None:
        """Write a value."""

    def get(self, key: str) -> bytes | None:
        """Read a value; None: there is none."""

    def delete(self, key: str) -> None:
        """Remove a value, if there is one."""

    def keys(self, prefix: str) -> Sequence[str]:
        """Return the keys that begin with a prefix."""


class ClusterKeyValues:
    """KeyValues in the control service of this process's cluster.

    Ray marks these functions as internal; what it offers in public is an actor, thus a process more on the head node,
    whose end nobody would see to.
    """

    def put(self, key: str, value: bytes) -> None:
        """Write a value."""
        internal_kv._internal_kv_put(key, value, namespace=_NAMESPACE)

    def get(self, key: str) -> bytes | None:
        """Read a value; None: there is none."""
        value: bytes | None = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
        return value

    def delete(self, key: str) -> None:
        """Remove a value, if there is one."""
        internal_kv._internal_kv_del(key, namespace=_NAMESPACE)

    def keys(self, prefix: str) -> Sequence[str]:
        """Return the keys that begin with a prefix."""
        return [key.decode() for key in internal_kv._internal_kv_list(prefix, namespace=_NAMESPACE)]
