"""An engine in a Python environment of its own, with the versions that TensorRT-LLM 1.2.1 pins; its replica is in ours.

Two real virtual environments on one Ray cluster. The engine's is made by tools/make_engine_env.py, if it is not there.
"""

import contextlib
import gc
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import openai
import pytest
import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from serve.core.parallel import ParallelLayout
from serve.core.placement import LauncherKind, PlacementPlan, actor_options, plan_placement
from serve.core.request import GenerateRequest, SamplingParams, pack_tokens
from serve.engines.factory import AnyEngineSettings
from serve.engines.simulated.faults import Fault
from serve.engines.simulated.settings import FixedLatencySettings, SimulatedSettings
from serve.engines.trtllm.settings import TrtllmSettings
from serve.errors import ConfigError, EngineDead
from serve.workers.engine_env import EngineEnv
from serve.workers.processes import marked_processes
from tests.doubles.install import double_path
from tests.integration.engine_env_replica import EnvReplica
from tests.integration.serving import Serving
from tools.make_engine_env import make_engine_env

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


def plan_for(layout: ParallelLayout, launcher: LauncherKind) -> PlacementPlan:
    rank = {"CPU": 1.0 if launcher == "ray" else 0.1, "GPU": 1.0}
    return plan_placement(layout, launcher, replica={"CPU": 0.1}, rank=rank, own_environment=True)


PLAN = plan_for(ParallelLayout(), "in_process")
ENGINE = SimulatedSettings(vocab_size=1000, latency=FixedLatencySettings(decode_step_s=0.002))
PINNED = {"fastapi": "0.121.3", "transformers": "4.57.3", "numpy": "1.26.4"}
QUICKSTART = Path(__file__).parents[2] / "serve/models/quickstart"
WAIT_S = 60.0


@pytest.fixture(scope="session")
def engine_python() -> str:
    """The other environment's interpreter."""
    return str(make_engine_env())


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray node that pretends to have GPUs."""
    ray.init(
        "local",  # never a cluster that happens to run here
        num_cpus=3,
        num_gpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
    )
    yield
    ray.shutdown()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # Ray does not wait for the processes it ended
        gc.collect()


@pytest.fixture
def make_replica(cluster: None) -> Iterator[Callable[..., Any]]:
    """Makes a replica in a placement group of its own."""
    made: list[tuple[Any, Any]] = []

    def make(
        env: EngineEnv, engine: AnyEngineSettings = ENGINE, model_dir: str = "/", plan: PlacementPlan = PLAN
    ) -> Any:
        group = ray.util.placement_group([dict(bundle) for bundle in plan.bundles], strategy=plan.strategy)
        options = {
            **actor_options(plan.replica),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group, 0),
        }
        replica = ray.remote(EnvReplica).options(**options).remote(plan, env, engine, model_dir)
        made.append((replica, group))
        return replica

    yield make
    for replica, group in made:
        ray.kill(replica)
        ray.util.remove_placement_group(group)


def get(reference: Any) -> Any:
    """Wait for a result; an error of ours is raised as itself."""
    try:
        return ray.get(reference, timeout=WAIT_S)
    except ray.exceptions.RayTaskError as exc:
        raise exc.cause from None


def request(name: str, max_tokens: int, prompt: int = 40) -> GenerateRequest:
    return GenerateRequest(
        name, "m", pack_tokens(range(prompt)), SamplingParams(temperature=0.0, max_tokens=max_tokens)
    )


def until(condition: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.02)


def processes_of(group: str) -> dict[int, Any]:
    return dict(marked_processes(lambda mark: mark.group == group))


def test_both_environments_serve_as_one(make_replica: Callable[..., Any], engine_python: str) -> None:
    replica = make_replica(EngineEnv(py_executable=engine_python, env_vars={"RAYTRT_TEST": "yes"}))
    report = get(replica.start.remote())
    ours = get(replica.describe.remote())

    assert report.python == engine_python
    assert {name: report.libraries[name] for name in PINNED} == PINNED
    assert ours["libraries"]["fastapi"] == version("fastapi") != PINNED["fastapi"]
    assert ours["libraries"]["transformers"] == version("transformers") != PINNED["transformers"]
    assert ours["libraries"]["numpy"] == version("numpy") != PINNED["numpy"]
    assert report.libraries["ray"] == ours["libraries"]["ray"]
    assert report.libraries["raytrt"] == ours["libraries"]["raytrt"]
    assert report.process.pid != ours["pid"]

    tokens = get(replica.generate.remote(request("a", 70)))
    assert len(tokens) == 70
    assert get(replica.generate.remote(request("b", 70))) == tokens
    assert get(replica.cached_blocks.remote()) > 0
    assert get(replica.stats.remote()).generated_tokens == 140

    def look_around(_: object) -> tuple[list[str], dict[str, str]]:  # pickled by value: there is no pytest over there
        return sorted(sys.modules), dict(os.environ)

    host = get(replica.host.remote())
    modules, variables = get(host.__ray_call__.remote(look_around))
    needless = {name for name in modules if name.partition(".")[0] in ("fastapi", "uvicorn", "transformers", "torch")}
    assert not needless
    assert not [name for name in modules if name.startswith("ray.serve")]
    assert variables["RAYTRT_TEST"] == "yes"
    assert len(variables["CUDA_VISIBLE_DEVICES"].split(",")) == 1

    assert processes_of(ours["group"])
    get(replica.stop.remote())
    assert not processes_of(ours["group"])


def test_a_host_that_is_killed_fails_the_group_at_once(make_replica: Callable[..., Any], engine_python: str) -> None:
    replica = make_replica(EngineEnv(py_executable=engine_python))
    report = get(replica.start.remote())
    group = get(replica.describe.remote())["group"]
    streams = [replica.generate_until_death.remote(request(str(i), 4000)) for i in range(8)]
    until(lambda: get(replica.stats.remote()).running == 8, "running")
    os.kill(report.process.pid, signal.SIGKILL)
    reasons = {get(stream) for stream in streams}
    assert "it ended by itself" not in reasons
    assert "healthy" not in get(replica.wait_until_stopped.remote())
    assert not processes_of(group)


def test_a_replica_that_is_killed_takes_its_host_along(make_replica: Callable[..., Any], engine_python: str) -> None:
    replica = make_replica(EngineEnv(py_executable=engine_python))
    get(replica.start.remote())
    ours = get(replica.describe.remote())
    assert processes_of(ours["group"])
    os.kill(ours["pid"], signal.SIGKILL)
    until(lambda: not processes_of(ours["group"]), "the host is still there")


def test_an_error_of_the_start_comes_through_and_leaves_nothing(
    make_replica: Callable[..., Any], engine_python: str
) -> None:
    env = EngineEnv(py_executable=engine_python)
    dying = make_replica(env, ENGINE.model_copy(update={"faults": (Fault(kind="fail_start"),)}))
    with pytest.raises(EngineDead, match="does not start"):
        get(dying.start.remote())
    # That environment has all that TensorRT-LLM pins, but not TensorRT-LLM.
    wrong = make_replica(env, TrtllmSettings(), str(QUICKSTART))
    with pytest.raises(ConfigError, match="tensorrt_llm"):
        get(wrong.start.remote())


def test_an_environment_that_cannot_join_is_refused_before_anything_starts(
    make_replica: Callable[..., Any], tmp_path: Path
) -> None:
    other = tmp_path / "python"
    other.write_text(
        """#!/bin/sh
echo 'raytrt-probe {"python": "3.9.1", "executable": "/other/python", "libraries": {"ray": "2.54.1"}}'
"""
    )
    other.chmod(0o700)
    replica = make_replica(EngineEnv(py_executable=str(other)))
    with pytest.raises(ConfigError, match=r"has Python 3\.9\.1 and Ray 2\.54\.1, but its replica") as raised:
        get(replica.start.remote())
    assert f"ray=={version('ray')}" in str(raised.value)
    assert get(replica.host.remote()) is None
    with contextlib.suppress(EngineDead):
        get(replica.stop.remote())


def env_of_1_2(engine_python: str) -> EngineEnv:
    return EngineEnv(py_executable=engine_python, env_vars={"PYTHONPATH": str(double_path("1.2.x"))})


def test_tensorrt_llm_1_2_beside_a_gateway_of_today(make_replica: Callable[..., Any], engine_python: str) -> None:
    """The contract double of 1.2.x in that environment, on the quickstart model."""
    replica = make_replica(env_of_1_2(engine_python), TrtllmSettings(), str(QUICKSTART))
    report = get(replica.start.remote())
    ours = get(replica.describe.remote())
    assert "1.2.1" in ours["engine"]
    assert report.libraries["transformers"] == PINNED["transformers"]
    tokens = get(replica.generate.remote(request("a", 24)))
    assert len(tokens) == 24
    assert get(replica.generate.remote(request("b", 24))) == tokens
    get(replica.stop.remote())
    assert not processes_of(ours["group"])


@pytest.mark.parametrize("orchestrator", ["mpi", "ray"])
def test_ranks_below_a_host_are_watched_like_any(
    orchestrator: LauncherKind, make_replica: Callable[..., Any], engine_python: str
) -> None:
    plan = plan_for(ParallelLayout(tensor=2), orchestrator)
    replica = make_replica(env_of_1_2(engine_python), TrtllmSettings(), str(QUICKSTART), plan)
    get(replica.start.remote())
    ours = get(replica.describe.remote())
    assert len(get(replica.generate.remote(request("a", 8)))) == 8
    ranks = {process.rank: process.pid for process in get(replica.ranks.remote())}
    assert sorted(ranks) == [0, 1, 2]  # the last is the host
    titles = {rank: Path(f"/proc/{pid}/cmdline").read_bytes() for rank, pid in ranks.items()}
    assert b"EngineHost" in titles[2]
    assert not any(b"IDLE" in title for title in titles.values())
    os.kill(ranks[1], signal.SIGKILL)
    assert "rank 1" in get(replica.wait_until_stopped.remote())
    assert not processes_of(ours["group"])


def test_a_config_file_with_both_environments(engine_python: str, tmp_path: Path) -> None:
    """What an operator does: two models behind one gateway, one of them on TensorRT-LLM 1.2.x."""
    small = {"num_cpus": 0.05, "num_gpus": 0, "replica_cpus": 0.05}
    env = {"py_executable": engine_python, "env_vars": {"PYTHONPATH": str(double_path("1.2.x"))}}
    models = [
        {"id": "here", "engine": {"kind": "simulated", "speed": 0}, "resources": small},
        {"id": "there", "engine": "trtllm", "engine_env": env, "resources": small},
    ]
    serving = Serving({"models": models, "gateway": {"num_cpus": 0.05}}, tmp_path)
    try:
        serving.wait_until_ready()
        with openai.OpenAI(base_url=f"{serving.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            for model in ("here", "there"):
                answer = client.completions.create(model=model, prompt="Ray is", max_tokens=12, temperature=0)
                assert answer.usage is not None
                assert answer.usage.completion_tokens == 12
        names = {" ".join(process.cmdline()) for process in serving.processes()}
        assert any("EngineHost" in name for name in names)
    finally:
        serving.end()
