"""EngineEnv: the Python environment of an engine, where that is not its replica's.

TensorRT-LLM pins libraries that Ray Serve needs in other versions (docs/environments.md), so the process that hosts an
engine can run in an environment of its own. Ray joins processes of one Python minor version and one Ray version only,
and does no more than log a mismatch: `check_engine_env` finds it before anything is started.
"""

import asyncio
import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Self

from pydantic import Field, model_validator

from serve.core.strict_model import StrictModel
from serve.errors import ConfigError

PROBE_TIMEOUT_S = 120.0  # an image may have to be loaded from a slow disk
_NEEDED = ("ray", "raytrt", "msgspec", "numpy", "psutil", "pydantic")
_SHOWN = ("fastapi", "numpy", "torch", "transformers", "tensorrt_llm")
_PROBE = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
def find(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None
print("raytrt-probe " + json.dumps({
    "python": ".".join(map(str, sys.version_info[:3])),
    "executable": sys.executable,
    "libraries": {name: find(name) for name in sys.argv[1].split(",")},
}))
"""


class EngineEnv(StrictModel):
    """Where the engine's process finds its Python and its libraries; exactly one of the first three."""

    py_executable: str | None = Field(
        default=None, description="Python of an environment that is on every node at this path: /opt/trtllm/bin/python."
    )
    conda: str | None = Field(default=None, description="Name or path of a conda environment that is on every node.")
    image_uri: str | None = Field(
        default=None, description="Container image, started with podman on the replica's node (Ray's own mechanism)."
    )
    env_vars: dict[str, str] = Field(default={}, description="Environment variables of the engine's process.")

    @model_validator(mode="after")
    def _has_one_place(self) -> Self:
        given = [name for name in ("py_executable", "conda", "image_uri") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) if given else "none"
            raise ValueError(f"give exactly one of py_executable, conda and image_uri (got {found})")
        if not getattr(self, given[0]).strip():
            raise ValueError(f"{given[0]} is empty; name the environment, or remove engine_env")
        return self

    @property
    def place(self) -> str:
        """The setting that was given, for messages."""
        for name in ("py_executable", "conda", "image_uri"):
            if (value := getattr(self, name)) is not None:
                return f"{name}: {value}"
        raise AssertionError("one is given")

    def to_runtime_env(self, environ: Mapping[str, str]) -> dict[str, Any]:
        """Return Ray's `runtime_env`.

        Args:
            environ: Variables that the engine's process needs; those of the configuration win.
        """
        # Another patch release of Python is no obstacle; without this Ray reports it as an error, and goes on.
        variables = {"RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL": "minor", **environ, **self.env_vars}
        name, _, value = self.place.partition(": ")
        return {name: value, "env_vars": variables}

    def probe_command(self) -> list[str]:
        """Return the command that starts this environment's Python, as Ray would."""
        if self.py_executable is not None:
            return shlex.split(self.py_executable)
        if self.conda is not None:
            option = "-p" if "/" in self.conda else "-n"
            return ["conda", "run", option, self.conda, "python"]
        assert self.image_uri is not None
        return ["podman", "run", "--rm", "--entrypoint", "python", self.image_uri]


@dataclass(frozen=True)
class EnvReport:
    """What there is in one Python environment.

    Attributes:
        python: Its version, three numbers.
        executable: Its path.
        libraries: Version of each library that matters, None if it is not installed.
    """

    python: str
    executable: str
    libraries: Mapping[str, str | None]

    def __str__(self) -> str:
        shown = {name: self.libraries.get(name) for name in ("ray", "raytrt", *_SHOWN)}
        found = ", ".join(f"{name} {number}" for name, number in shown.items() if number)
        return f"Python {self.python} at {self.executable} ({found})"


def own_report() -> EnvReport:
    """Report on the environment of this process."""
    libraries = {name: _version(name) for name in (*_NEEDED, *_SHOWN)}
    return EnvReport(".".join(map(str, sys.version_info[:3])), sys.executable, libraries)


async def check_engine_env(env: EngineEnv) -> EnvReport:
    """Check that a process in `env` could join this process's cluster; run on the node where it will be started.

    Raises:
        ConfigError: It cannot; names both sides.
    """
    theirs = await probe_engine_env(env)
    if problem := find_mismatch(own_report(), theirs):
        raise ConfigError(f"engine_env.{env.place}: {problem}")
    return theirs


async def probe_engine_env(env: EngineEnv) -> EnvReport:
    """Start the environment's Python once and report on it.

    Raises:
        ConfigError: It does not start.
    """
    command = [*env.probe_command(), "-c", _PROBE, ",".join((*_NEEDED, *_SHOWN))]
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd="/"
        )
    except OSError as exc:
        raise ConfigError(
            f"engine_env.{env.place}: cannot be started on this node ({exc}); it has to be on every node that may run "
            "a replica"
        ) from exc
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            output, errors = await process.communicate()
    except TimeoutError:
        raise ConfigError(f"engine_env.{env.place}: gives no answer within {PROBE_TIMEOUT_S:.0f} s") from None
    finally:
        if process.returncode is None:
            process.kill()
    for line in output.decode(errors="replace").splitlines():
        if line.startswith("raytrt-probe "):
            return EnvReport(**json.loads(line.removeprefix("raytrt-probe ")))
    last = (errors.decode(errors="replace").strip().splitlines() or ["it prints nothing"])[-1]
    raise ConfigError(f"engine_env.{env.place}: is no Python that works (status {process.returncode}): {last}")


def find_mismatch(ours: EnvReport, theirs: EnvReport) -> str | None:
    """Return why a process of one environment cannot host an engine for the other; None if it can."""
    ray, their_ray = ours.libraries.get("ray"), theirs.libraries.get("ray")
    minor = ours.python.rpartition(".")[0]
    if theirs.python.rpartition(".")[0] != minor or their_ray != ray:
        return (
            f"has Python {theirs.python} and {f'Ray {their_ray}' if their_ray else 'no Ray'}, but its replica and the "
            f"cluster run Python {ours.python} and Ray {ray}; one cluster takes one Python minor version and one Ray "
            f"version: make that environment with Python {minor} and ray=={ray}, or start the cluster with its versions"
        )
    missing = [name for name in _NEEDED if not theirs.libraries.get(name)]
    if missing:
        return f"lacks {', '.join(missing)}; install them there (configs/environments lists what an engine needs)"
    if theirs.libraries["raytrt"] != ours.libraries.get("raytrt"):
        return (
            f"has raytrt {theirs.libraries['raytrt']}, but its replica runs {ours.libraries.get('raytrt')}; install "
            "the same release in both"
        )
    return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
