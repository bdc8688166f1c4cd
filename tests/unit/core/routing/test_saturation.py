"""saturated: a fleet has room while one replica has."""

import pytest

from serve.core.routing.saturation import RoomLimits, has_room, saturated
from tests.unit.core.routing.views import view

LIMITS = RoomLimits(max_wait_s=1.0, max_waiting=8, max_kv_share=0.9)
BLOCKS = [100.0, 100.0]


@pytest.mark.parametrize(
    "full",
    [
        {"waiting": 8.0},
        {"queued_prefill_tokens": 1001.0},
        {"active_blocks": 91.0},
    ],
)
def test_a_replica_is_full_for_one_reason(full: dict[str, float]) -> None:
    rates = {"prefill_token_s": [0.001, 0.001], "total_blocks": BLOCKS}
    one = view(2, **rates, **{name: [number, 0.0] for name, number in full.items()})
    assert has_room(one, LIMITS).tolist() == [False, True]
    assert not saturated(one, LIMITS)
    assert saturated(view(2, **rates, **{name: [number, number] for name, number in full.items()}), LIMITS)


def test_at_its_limits_a_replica_has_room() -> None:
    busy = {"waiting": [7.0], "queued_prefill_tokens": [1000.0], "active_blocks": [90.0], "running": [500.0]}
    assert not saturated(view(1, total_blocks=[100.0], prefill_token_s=[0.001], **busy), LIMITS)


def test_an_empty_fleet_is_not_saturated() -> None:
    assert not saturated(view(0), LIMITS)
