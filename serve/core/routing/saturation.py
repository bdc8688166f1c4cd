"""How many more requests the fleet has room for; when it has none, they wait in the gateway's fair queue."""

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
    max_waiting: int = 32
    max_kv_share: float = 0.97


def has_room(view: FleetView, limits: RoomLimits) -> npt.NDArray[np.bool_]:
    """Return which candidates are not full."""
    kv_full = (view.active_blocks > limits.max_kv_share * view.total_blocks) & (view.total_blocks > 1.0)
    room: npt.NDArray[np.bool_] = (
        (view.queued_prefill_tokens * view.queued_token_s <= limits.max_wait_s)
        & (view.waiting < limits.max_waiting)
        & ~kv_full
    )
    return room


def saturated(view: FleetView, limits: RoomLimits) -> bool:
    """Return whether every candidate is full; with no candidate, nobody is, and whoever routes says what is wrong."""
    return len(view) > 0 and not has_room(view, limits).any()


def places(view: FleetView, limits: RoomLimits, prompt_tokens: float) -> int:
    """Return for how many requests there is room before somebody should look again.

    Args:
        view: The fleet.
        limits: When a replica is full.
        prompt_tokens: > 0; what each of them will compute.
    """
    by_waiting = limits.max_waiting - view.waiting
    per_request_s = np.maximum(prompt_tokens * view.queued_token_s, 1e-9)
    by_time = (limits.max_wait_s - view.queued_prefill_tokens * view.queued_token_s) / per_request_s
    each = np.maximum(np.ceil(np.minimum(by_waiting, by_time)), 1.0)
    return int(each[has_room(view, limits)].sum())
