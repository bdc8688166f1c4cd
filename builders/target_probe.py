"""The facts of a target's node: as our Python sees them, and as the engine's environment does."""

import asyncio
import os
import subprocess

from serve.artifacts.node_facts import NodeFacts
from serve.artifacts.node_probe import probe_node
from serve.errors import ConfigError
from serve.workers.engine_env import PROBE_TIMEOUT_S, EngineEnv, check_engine_env


def probe_target(env: EngineEnv | None) -> tuple[NodeFacts, NodeFacts]:
    """Probe this node. Blocks for a second or two where there is an environment.

    Returns:
        Facts of our Python, and of the engine's; the same if there is no environment.

    Raises:
        ConfigError: The environment cannot be started here, or could not join our cluster; says why.
    """
    ours = probe_node(all_gpus=True)
    if env is None:
        return ours, ours
    if env.image_uri is not None:
        raise ConfigError(
            f"target.engine_env.{env.place}: Ray mounts none of a node's directories into such a container, so "
            "that its steps would see neither model nor output; run Ray itself in that container, or give py_executable"
        )
    asyncio.run(check_engine_env(env))
    command = [*env.probe_command(), "-m", "serve.artifacts.node_probe"]
    environ = {**os.environ, **env.env_vars}
    try:
        answer = subprocess.run(
            command, env=environ, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=True, cwd="/"
        )
    except (OSError, subprocess.SubprocessError) as exc:
        errors = str(getattr(exc, "stderr", "") or exc).strip().splitlines()
        raise ConfigError(f"target.engine_env.{env.place}: cannot be asked what it has: {errors[-1]}") from exc
    # GPUs are the node's, whatever a container sees of them.
    theirs = NodeFacts.model_validate_json(answer.stdout.strip().splitlines()[-1])
    return ours, ours.model_copy(update={"libraries": theirs.libraries})
