"""From launches to an engine that serves: the configured one, tried several times, else its fallback."""

import logging
from collections.abc import Callable

from serve.errors import ConfigError
from serve.workers.group import WorkerGroup
from serve.workers.launch import EngineLaunch

logger = logging.getLogger(__name__)


async def start_engine(
    model_id: str,
    launch: EngineLaunch,
    fallback: EngineLaunch | None,
    max_failures: int,
    make_group: Callable[[EngineLaunch], WorkerGroup],
) -> tuple[WorkerGroup, bool]:
    """Start a model's engine, and return its group and whether it is the fallback.

    Without a fallback there is one try: Serve makes a new replica after it, in a new process. With one, each try leaves
    nothing behind before the next begins, and a mistake in the configuration is not tried again.

    Args:
        model_id: For the log.
        launch: The configured engine.
        fallback: What serves if that fails; None: nothing.
        max_failures: Tries of the configured engine, if there is a fallback.
        make_group: Makes the group of a launch.

    Raises:
        Exception: What the last try failed of.
    """
    if fallback is None:
        return await _start(model_id, make_group(launch)), False
    for failures in range(1, max_failures + 1):
        try:
            return await _start(model_id, make_group(launch), f" (try {failures} of {max_failures})"), False
        except ConfigError:
            break
        except Exception:  # whatever it was, the fallback may serve; `_start` has told of it
            continue
    logger.error("%s falls back to engine %s.", model_id, fallback.engine.kind)
    return await _start(model_id, make_group(fallback)), True


async def _start(model_id: str, group: WorkerGroup, which: str = "") -> WorkerGroup:
    try:
        await group.start()
    except Exception as exc:
        # Serve tells this to its controller's log only; say it where the operator looks.
        logger.error("%s does not start%s: %s", model_id, which, exc)
        await group.stop()
        raise
    return group
