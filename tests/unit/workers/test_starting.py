"""Which failures of a start are answered by the fallback, and after how many tries."""

import pytest

from serve.core.parallel import ParallelLayout
from serve.engines.simulated.settings import SimulatedSettings
from serve.errors import ConfigError, EngineDead
from serve.workers.group import WorkerGroup
from serve.workers.group_settings import GroupSettings
from serve.workers.launch import EngineLaunch, plan_launch
from serve.workers.settings import RankResources
from serve.workers.starting import start_engine
from tests.unit.workers.fake_launcher import FakeLauncher

WATCH = GroupSettings(heartbeat_s=0.05, heartbeat_limit_s=0.2, end_grace_s=0.1, lease_s=1.0)


def launch(seed: int) -> EngineLaunch:
    engine = SimulatedSettings()
    plan = plan_launch(engine, ParallelLayout(), RankResources(), mpi_works=lambda: True)
    return EngineLaunch(engine, f"/models/{seed}", plan, None, WATCH)


@pytest.mark.parametrize(
    ("error", "tries"), [(ConfigError("no such model"), 1), (EngineDead("lost"), 2), (ImportError("libcuda"), 2)]
)
async def test_any_failure_is_answered_by_the_fallback(error: Exception, tries: int) -> None:
    configured, fallback = launch(0), launch(1)
    launchers: list[FakeLauncher] = []

    def make(asked: EngineLaunch) -> WorkerGroup:
        launchers.append(FakeLauncher(error=error if asked is configured else None, world_size=1))
        return WorkerGroup(launchers[-1], WATCH)

    group, is_fallback = await start_engine("m", configured, fallback, 2, make)
    assert (is_fallback, len(launchers)) == (True, tries + 1)
    await group.stop()
    for launcher in launchers:
        launcher.collect()
