"""Whether the fleet has room for another request, or requests have to wait in the gateway's queue."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from serve.core.routing.decision import FleetView


@dataclass(frozen=True)
class RoomLimits:
    """When a replica is full. Beyond them a request gains nothing from being there, and its place could be another's.

    Attributes:
        max_wait_s: Prompts there keep the engine busy for longer.
        max_waiting: So many requests have been accepted, or are on their way, that are not in the batch.
        max_kv_share: The sequences there use more of the KV blocks.
    """

    max_wait_s: float = 1.0
    max_waiting: int = 8
    max_kv_share: float = 0.97


def has_room(view: FleetView, limits: RoomLimits) -> npt.NDArray[np.bool_]:
    """Return which candidates are not full."""
    room: npt.NDArray[np.bool_] = (
        (view.queued_prefill_tokens * view.prefill_token_s <= limits.max_wait_s)
        & (view.waiting < limits.max_waiting)
        & (view.active_blocks <= limits.max_kv_share * view.total_blocks)
    )
    return room


def saturated(view: FleetView, limits: RoomLimits) -> bool:
    """Return whether every candidate is full; with no candidate, nobody is, and whoever routes says what is wrong."""
    return len(view) > 0 and not has_room(view, limits).any()
