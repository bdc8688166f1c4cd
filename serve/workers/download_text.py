"""How far a download is, in words."""

from collections.abc import Sequence
from dataclasses import dataclass

from serve.artifacts.bundle_source import BundleSource

_UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass
class Transfer:
    """Bytes on their way to one node. `note` may be called from any thread.

    Attributes:
        started_s: When it began, monotonic.
        done: Bytes that are there.
        total: Bytes in all; 0: not known yet.
        there_before: Bytes that were there when it was first looked.
    """

    started_s: float
    done: int = 0
    total: int = 0
    there_before: int | None = None

    def note(self, done: int, total: int) -> None:
        """Say how far it is."""
        if self.there_before is None:
            self.there_before = done
        self.done, self.total = done, total

    @property
    def share(self) -> float:
        """How much of it is there, from 0 to 1."""
        return self.done / self.total if self.total else 0.0

    def bytes_per_s(self, now_s: float) -> float:
        """Return the mean speed until now."""
        elapsed_s = now_s - self.started_s
        return (self.done - (self.there_before or 0)) / elapsed_s if elapsed_s > 0 else 0.0


def download_text(bundle: BundleSource, transfers: Sequence[Transfer], now_s: float) -> str:
    """Describe a download to one node or several, by the one that is behind the others.

    Args:
        bundle: What is downloaded.
        transfers: Of each node.
        now_s: Monotonic.
    """
    last = min(transfers, key=lambda transfer: transfer.share)
    nodes = f", {len(transfers)} nodes" if len(transfers) > 1 else ""
    return (
        f"downloading bundle {bundle}: {int(100 * last.share)} % of {size_text(bundle.manifest.size_bytes)}, "
        f"{size_text(last.bytes_per_s(now_s))}/s{nodes}"
    )


def size_text(size_bytes: float) -> str:
    """Return a size with three digits."""
    size, unit = max(0.0, float(size_bytes)), 0
    while size >= 999.5 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.3g} {_UNITS[unit]}"
