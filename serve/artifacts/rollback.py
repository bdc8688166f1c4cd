"""Rollback: which bundle an alias goes back to. Pure."""

from collections.abc import Callable, Sequence

from serve.artifacts.port import AliasMove


def rollback_target(history: Sequence[AliasMove], exists: Callable[[str], bool] = lambda _: True) -> str | None:
    """Return the newest bundle of an alias's history that is neither where it points now, nor was rejected ever.

    Args:
        history: Moves, oldest first.
        exists: Whether a fingerprint's bundle is still there.

    Returns:
        Its fingerprint; None: there is none.
    """
    if not history:
        return None
    rejected = {move.rejected for move in history}
    current = history[-1].fingerprint
    for move in reversed(history):
        if move.fingerprint != current and move.fingerprint not in rejected and exists(move.fingerprint):
            return move.fingerprint
    return None
