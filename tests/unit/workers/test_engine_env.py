"""An engine's own environment: its settings, what Ray makes of them, and what is refused before anything starts."""

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from serve.errors import ConfigError
from serve.workers.engine_env import (
    EngineEnv,
    EnvReport,
    check_engine_env,
    find_mismatch,
    own_report,
    probe_engine_env,
)

OURS = EnvReport(
    "3.11.7",
    "/gateway/python",
    {"ray": "2.60.0", "raytrt": "0.1.0", "msgspec": "1", "numpy": "2", "psutil": "7", "pydantic": "2"},
)


def with_library(name: str, number: str | None) -> EnvReport:
    return replace(OURS, libraries={**OURS.libraries, name: number})


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({}, "none"),
        ({"env_vars": {"A": "b"}}, "none"),
        ({"conda": "a", "image_uri": "b"}, "conda and image_uri"),
        ({"py_executable": " "}, "py_executable is empty"),
    ],
)
def test_exactly_one_place_is_given(settings: dict[str, Any], found: str) -> None:
    with pytest.raises(ValidationError, match=found):
        EngineEnv(**settings)


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(ValidationError, match="pip"):
        EngineEnv.model_validate({"pip": ["tensorrt_llm"]})


@pytest.mark.parametrize(
    ("name", "value"),
    [("py_executable", "/opt/e/bin/python -X dev"), ("conda", "trtllm"), ("image_uri", "nvcr.io/a/b:1.2.1")],
)
def test_it_becomes_rays_runtime_env(name: str, value: str) -> None:
    env = EngineEnv.model_validate({name: value, "env_vars": {"OURS": "yes", "MARK": "theirs"}})
    made = env.to_runtime_env({"MARK": "ours"})
    assert made.pop(name) == value
    assert made == {
        "env_vars": {"OURS": "yes", "MARK": "theirs", "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL": "minor"},
    }


@pytest.mark.parametrize(
    ("settings", "command"),
    [
        ({"py_executable": "/opt/e/bin/python -X 'a b'"}, ["/opt/e/bin/python", "-X", "a b"]),
        ({"conda": "trtllm"}, ["conda", "run", "-n", "trtllm", "python"]),
        ({"conda": "/opt/conda/envs/t"}, ["conda", "run", "-p", "/opt/conda/envs/t", "python"]),
        ({"image_uri": "i:1"}, ["podman", "run", "--rm", "--entrypoint", "python", "i:1"]),
    ],
)
def test_it_is_probed_as_it_will_be_started(settings: dict[str, str], command: list[str]) -> None:
    assert EngineEnv.model_validate(settings).probe_command() == command


@pytest.mark.parametrize(
    "theirs",
    [
        OURS,
        replace(OURS, python="3.11.2"),  # another patch release
        with_library("numpy", "1.26.4"),
        with_library("fastapi", "0.121.3"),
    ],
)
def test_what_can_join(theirs: EnvReport) -> None:
    assert find_mismatch(OURS, theirs) is None


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (replace(OURS, python="3.12.3"), ["Python 3.12.3", "Python 3.11.7", "with Python 3.11"]),
        (replace(OURS, python="3.1.7"), ["Python 3.1.7"]),
        (with_library("ray", "2.54.1"), ["Ray 2.54.1", "Ray 2.60.0", "ray==2.60.0"]),
        (with_library("ray", None), ["no Ray", "ray==2.60.0"]),
        (with_library("raytrt", "0.2.0"), ["raytrt 0.2.0", "0.1.0", "same release"]),
        (with_library("raytrt", None), ["lacks raytrt"]),
        (with_library("msgspec", None), ["lacks msgspec"]),
    ],
)
def test_what_cannot_join_is_told_with_both_sides(theirs: EnvReport, said: list[str]) -> None:
    message = find_mismatch(OURS, theirs)
    assert message is not None
    assert all(words in message for words in said), message


async def test_this_environment_can_join_itself() -> None:
    theirs = await check_engine_env(EngineEnv(py_executable=sys.executable))
    assert theirs == own_report()


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return str(path)


async def test_a_python_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none/python: cannot be started on this node .* every node"):
        await probe_engine_env(EngineEnv(py_executable=str(tmp_path / "none/python")))


async def test_a_python_that_does_not_work(tmp_path: Path) -> None:
    broken = script(tmp_path / "python", "echo 'libpython3.11.so: cannot open' >&2; exit 127")
    with pytest.raises(ConfigError, match=r"status 127\): libpython3\.11\.so: cannot open"):
        await probe_engine_env(EngineEnv(py_executable=broken))


async def test_what_a_start_script_prints_does_not_matter(tmp_path: Path) -> None:
    noisy = script(tmp_path / "python", f'echo "Welcome to the cluster"; exec {sys.executable} "$@"')
    assert (await probe_engine_env(EngineEnv(py_executable=noisy))).python == own_report().python


async def test_a_probe_that_is_cancelled_leaves_no_process(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    slow = script(tmp_path / "python", f"echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}; exec sleep 600")
    probing = asyncio.ensure_future(probe_engine_env(EngineEnv(py_executable=slow)))
    async with asyncio.timeout(30):
        while not pid_file.exists():  # noqa: ASYNC110  # a shell signals nothing
            await asyncio.sleep(0.01)
    probing.cancel()
    await asyncio.gather(probing, return_exceptions=True)
    pid = int(pid_file.read_text())
    async with asyncio.timeout(30):
        while os.path.exists(f"/proc/{pid}"):  # noqa: ASYNC110, ASYNC240
            await asyncio.sleep(0.01)


def test_the_host_imports_neither_ray_serve_nor_a_web_framework() -> None:
    """It has to run where there is none; heavy libraries are imported by the engine that needs them."""
    code = "import serve.workers.engine_host, sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    loaded = done.stdout.split()
    forbidden = ("fastapi", "uvicorn", "transformers", "torch", "tensorrt_llm", "tokenizers", "jinja2")
    assert not [name for name in loaded if name.partition(".")[0] in forbidden]
    assert not [name for name in loaded if name.startswith("ray.serve")]
    ours = {".".join(name.split(".")[:2]) for name in loaded if name.startswith("serve.")}
    assert ours <= {"serve.core", "serve.engines", "serve.errors", "serve.logs", "serve.workers"}
