"""The group's limit of a start leaves the engine time to say what went wrong."""

import pytest

from serve.core.parallel import ParallelLayout
from serve.engines.factory import AnyEngineSettings
from serve.engines.simulated.settings import SimulatedSettings
from serve.engines.trtllm.settings import TrtllmSettings
from serve.workers.group_settings import GroupSettings
from serve.workers.groups import start_limit_s
from serve.workers.launch import EngineLaunch, plan_launch
from serve.workers.settings import RankResources


@pytest.mark.parametrize(
    ("engine", "watch", "limit_s"),
    [
        (TrtllmSettings(start_timeout_s=600), GroupSettings(), 660.0),
        (TrtllmSettings(start_timeout_s=600), GroupSettings(start_limit_s=30), 30.0),
        (SimulatedSettings(), GroupSettings(), 1800.0),
    ],
)
def test_the_engine_s_own_limit_comes_first(engine: AnyEngineSettings, watch: GroupSettings, limit_s: float) -> None:
    plan = plan_launch(engine, ParallelLayout(), RankResources(), mpi_works=lambda: True)
    assert start_limit_s(EngineLaunch(engine, "/models/m", plan, None, watch)) == limit_s
