"""saturated: a fleet has room while one replica has."""

import pytest

from serve.core.routing.saturation import RoomLimits, has_room, places, saturated
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
    rates = {"queued_token_s": [0.001, 0.001], "total_blocks": BLOCKS}
    one = view(2, **rates, **{name: [number, 0.0] for name, number in full.items()})
    assert has_room(one, LIMITS).tolist() == [False, True]
    assert not saturated(one, LIMITS)
    assert saturated(view(2, **rates, **{name: [number, number] for name, number in full.items()}), LIMITS)


def test_at_its_limits_a_replica_has_room() -> None:
    busy = {"waiting": [7.0], "queued_prefill_tokens": [1000.0], "active_blocks": [90.0], "running": [500.0]}
    assert not saturated(view(1, total_blocks=[100.0], queued_token_s=[0.001], **busy), LIMITS)


def test_an_empty_fleet_is_not_saturated() -> None:
    assert not saturated(view(0), LIMITS)


def test_before_the_first_report_nobody_knows_how_many_blocks_there_are() -> None:
    assert not saturated(view(1, total_blocks=[1.0], active_blocks=[50.0]), LIMITS)


@pytest.mark.parametrize(
    ("waiting", "queued", "prompt_tokens", "number"),
    [
        ([0, 0], [0, 0], 10, 16),  # eight waiting each
        ([3, 8], [0, 0], 10, 5),
        ([0, 0], [0, 900], 100, 8 + 1),  # 0.1 s left, and 0.1 s each
        ([0, 0], [0, 900], 40, 8 + 3),  # the last one begins within the limit
        ([0, 0], [0, 1000], 9000, 2),  # whoever has room takes one, however long
        ([8, 0], [0, 1001], 10, 0),
    ],
)
def test_places_are_counted(waiting: list[float], queued: list[float], prompt_tokens: float, number: int) -> None:
    fleet = view(2, waiting=waiting, queued_prefill_tokens=queued, queued_token_s=[0.001, 0.001])
    assert places(fleet, LIMITS, prompt_tokens) == number
    assert saturated(fleet, LIMITS) == (number == 0)
