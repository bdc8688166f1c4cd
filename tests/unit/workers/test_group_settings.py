"""Limits that would contradict each other are refused."""

import pytest
from pydantic import ValidationError

from serve.workers.group_settings import GroupSettings


def test_a_limit_below_two_beats_is_refused() -> None:
    with pytest.raises(ValidationError, match="raise heartbeat_limit_s"):
        GroupSettings(heartbeat_s=1.0, heartbeat_limit_s=1.5)


def test_a_lease_that_ends_before_the_replica_can_tell_is_refused() -> None:
    with pytest.raises(ValidationError, match="raise lease_s"):
        GroupSettings(heartbeat_limit_s=2.0, lease_s=3.0)


def test_a_lost_rank_is_noticed_within_three_seconds() -> None:
    """As the defaults have it: the beat before, the limit, and the look after it."""
    settings = GroupSettings()
    assert settings.heartbeat_limit_s + settings.look_s < 3.0
