"""start_group: an engine of several ranks in a step's process, as a replica would start it."""

from pathlib import Path

from serve.core.placement import PlacementPlan
from serve.engines.factory import AnyEngineSettings
from serve.workers.group import WorkerGroup
from serve.workers.group_settings import GroupSettings
from serve.workers.groups import make_group
from serve.workers.launch import EngineLaunch
from serve.workers.launchers.hosting import make_hosting_launcher

# Nobody waits for a stream here, and a step has a time limit of its own: a slow machine is not a dead engine.
_WATCH = GroupSettings(
    heartbeat_limit_s=30.0,
    lease_s=120.0,
    token_limit_s=300.0,
    first_token_limit_s=900.0,
    token_limit_max_s=900.0,
)


async def start_group(
    settings: AnyEngineSettings, model_dir: Path, plan: PlacementPlan, *, ranks_are_actors: bool
) -> WorkerGroup:
    """Start a worker group.

    Args:
        settings: Of the engine.
        model_dir: Its checkpoint or engine files.
        plan: How its ranks are started; where Ray starts them, this process is in bundle 0 of it.
        ranks_are_actors: Whether Ray starts them; else they are processes below this one, and there need be no Ray.

    Raises:
        ConfigError, BundleMismatch, EngineDead: As the engine.
    """
    if ranks_are_actors:
        group = make_group(EngineLaunch(settings, str(model_dir), plan, None, _WATCH))
    else:
        group = WorkerGroup(make_hosting_launcher(settings, model_dir, plan, ""), _WATCH)
    await group.start()
    return group
