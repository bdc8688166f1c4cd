"""What the history of an alias says to replicas: which bundles not to try, and what was served before. Pure."""

from collections.abc import Sequence

from serve.artifacts.port import AliasMove


def rejected_bundles(history: Sequence[AliasMove]) -> frozenset[str]:
    """Return the bundles that replicas found not to work, and that nobody has pointed the alias to again since.

    Args:
        history: Moves of the alias, oldest first.
    """
    rejected: set[str] = set()
    for move in history:
        rejected.discard(move.fingerprint)
        if move.rejected is not None:
            rejected.add(move.rejected)
    return frozenset(rejected)


def bundle_before(history: Sequence[AliasMove], fingerprint: str) -> str | None:
    """Return the bundle that an alias pointed to before it came to point to `fingerprint`; None: there was none.

    Bundles that were rejected at any time are passed over.

    Args:
        history: Moves of the alias, oldest first.
        fingerprint: Of the bundle that is served. If the alias never pointed there, the newest one counts.
    """
    rejected = {move.rejected for move in history}
    last = max((number for number, move in enumerate(history) if move.fingerprint == fingerprint), default=len(history))
    for move in reversed(history[:last]):
        if move.fingerprint != fingerprint and move.fingerprint not in rejected:
            return move.fingerprint
    return None
