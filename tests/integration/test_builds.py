"""Builds on a real Ray cluster, with steps that do what the test wants."""

import gc
import json
import logging
import os
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from builders.build import BuildOptions, Built, build
from builders.context import StepName
from builders.display import NoDisplay
from builders.errors import BuildFailed, GateRefused
from builders.graph import StepState
from builders.inputs import BuildInputs, inputs_of
from builders.making import outline
from builders.spec import parse_spec
from serve.artifacts.blobs import blob_key
from serve.artifacts.manifest import BundleKind
from serve.artifacts.node_cache import NodeCache
from serve.artifacts.store import Store, open_store
from serve.errors import ConfigError
from tests.integration.build_program import INTERRUPTED, PACKAGE, BuildProgram
from tests.integration.stand_in_steps.behaviour import ENVIRONMENT_VARIABLE, VARIABLE

REPOSITORY = Path(__file__).parents[2]
WAIT_S = 60.0
SMALL = {"num_cpus": 0.1}
NO_DASHBOARD = {"include_dashboard": False}
STEPS = [step.value for step in StepName]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Ray cluster for all tests: a head, and nodes that pretend to have GPUs; all keep their files in one place."""
    place = tmp_path_factory.mktemp("machine")
    variables = {
        "RAYTRT_HOME": str(place / "home"),
        "RAYTRT_BUNDLE_CACHE": str(place / "cache"),
        VARIABLE: str(place),
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "num_gpus": 0, **NO_DASHBOARD})
        for _ in range(2):
            cluster.add_node(num_cpus=2, num_gpus=2, resources={"accelerator_type:H100": 1})
        ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        yield place
        ray.shutdown()
        cluster.shutdown()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # Ray does not wait for the processes it ended
        gc.collect()


class Steps:
    """What the stand-ins are told, and what they did."""

    def __init__(self, place: Path) -> None:
        self._place = place
        for path in [*place.glob("hold-*"), *place.glob("fail-*"), place / "journal", place / "verdict"]:
            path.unlink(missing_ok=True)

    def hold(self, step: str) -> None:
        (self._place / f"hold-{step}").touch()

    def release(self, step: str) -> None:
        (self._place / f"hold-{step}").unlink()

    def fail(self, step: str, *ends: str) -> None:
        (self._place / f"fail-{step}").write_text("\n".join(ends))

    def refuse(self, *reasons: str) -> None:
        (self._place / "verdict").write_text("\n".join(reasons))

    def accept(self) -> None:
        (self._place / "verdict").unlink()

    @property
    def begun(self) -> list[tuple[str, int]]:
        """Name and process of each step that began."""
        journal = self._place / "journal"
        lines = journal.read_text().splitlines() if journal.exists() else []
        return [(line.split()[0], int(line.split()[1])) for line in lines]

    @property
    def counts(self) -> Counter[str]:
        """How often each step began."""
        return Counter(name for name, _ in self.begun)

    def wait_for(self, step: str, times: int = 1) -> int:
        """Wait until a step has begun so often; returns its last process."""
        until(lambda: self.counts[step] >= times, f"{step} does not begin")
        return [pid for name, pid in self.begun if name == step][-1]


@pytest.fixture
def steps(machine: Path) -> Steps:
    return Steps(machine)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty one."""
    return open_store(str(tmp_path / "store"))


@pytest.fixture(scope="module")
def built_store(machine: Path) -> Path:
    """A store in which everything was built once."""
    Steps(machine)
    place = machine / "built"
    build(inputs(), open_store(str(place)), BuildOptions("here"), NoDisplay())
    return place


@pytest.fixture
def prepared(built_store: Path, steps: Steps, tmp_path: Path) -> Store:
    """A store with all steps up to tune, so that builds with another verify section begin there."""
    shutil.copytree(built_store, tmp_path / "prepared")
    return open_store(str(tmp_path / "prepared"))


def golden(samples: int) -> dict[str, Any]:
    """A verify section that nothing depends on but verify, and what comes after."""
    return {"texts": {"seed": 1}, "golden_samples": samples}


def document(**changes: Any) -> dict[str, Any]:
    """A build with all steps, though none needs TensorRT-LLM."""
    return {
        "name": "llama",
        "kind": "trtllm-checkpoint",
        "quantize": "fp8",
        "target": {**SMALL, "max_retries": 1},
        "verify": {"texts": {"seed": 1}},
    } | changes


def inputs(**changes: Any) -> BuildInputs:
    return inputs_of(parse_spec(document(**changes)), Path("/"), package=PACKAGE)


def make(store: Store, options: BuildOptions | None = None, **changes: Any) -> Built:
    return build(inputs(**changes), store, options or BuildOptions("here"), NoDisplay())


def until(condition: Callable[[], Any], message: str) -> Any:
    deadline_s = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < deadline_s, message
        time.sleep(0.02)
    return found


Start = Callable[..., BuildProgram]


@pytest.fixture
def start(machine: Path, tmp_path: Path) -> Iterator[Start]:
    """Start a program on the tests' cluster, or with a Ray of its own (`address="local"`)."""
    started: list[BuildProgram] = []

    def begin(store: Store, address: str = "", **changes: Any) -> BuildProgram:
        address = address or str(ray.get_runtime_context().gcs_address)
        directory = tmp_path / f"build-{len(started)}"
        started.append(BuildProgram(directory, document(**changes), store.url, address))
        return started[-1]

    yield begin
    for program in started:
        program.kill()


def assert_right(store: Store, scratch: Path) -> None:
    """Whatever is visible in a store is complete, and has the right content."""
    for fingerprint in store.bundles():
        manifest = store.find_bundle(fingerprint)
        assert manifest is not None
        NodeCache(scratch / "cache").fetch(store, manifest)
    for path in Path(store.url.removeprefix("file://"), "steps").glob("*.json"):
        record = store.find_step(path.stem)
        assert record is not None
        store.materialize(record.files, scratch / path.stem)


def test_whatever_is_killed_the_next_run_goes_on(
    machine: Path, steps: Steps, store: Store, start: Start, tmp_path: Path
) -> None:
    for step in STEPS:  # none goes further than the test is
        steps.hold(step)
    for number, step in enumerate(STEPS):
        begun = steps.counts[step]
        program = start(store)
        pid = steps.wait_for(step, begun + 1)
        if step == "compile":  # its process alone: the driver tries again
            os.kill(pid, signal.SIGKILL)
            steps.wait_for(step, begun + 2)
        program.kill()
        assert_right(store, tmp_path / f"looked-{number}")
        assert not store.bundles()
        steps.release(step)
    before = steps.counts
    program = start(store)
    status, fingerprint = program.wait()
    assert status == 0, program.said
    assert store.bundles() == (fingerprint,)
    assert_right(store, tmp_path / "looked")
    assert steps.counts - before == {"publish": 1}  # what had ended was not begun again
    until(lambda: not list((machine / "cache/work").iterdir()), "directories of killed steps are left")


def test_of_builders_of_one_bundle_one_works_and_the_others_share(steps: Steps, prepared: Store, start: Start) -> None:
    steps.hold("verify")
    first = start(prepared, verify=golden(1))
    steps.wait_for("verify")
    others = [start(prepared, verify=golden(1)) for _ in range(2)]
    for other in others:
        until(lambda: "waiting for" in other.said, "it does not wait")  # noqa: B023  # called at once
        assert f"waiting for the build of llama (process {first.pid} on" in other.said
    first.kill()  # one of the others takes over
    steps.wait_for("verify", times=2)
    steps.release("verify")
    one, two = (other.wait() for other in others)
    assert one == two
    assert one[0] == 0
    assert prepared.find_bundle(one[1]) is not None
    assert steps.counts == {"verify": 2, "publish": 1}
    assert [version.number for version in prepared.versions("llama")] == [1, 2]


def test_the_bundle_tells_how_it_was_made_and_is_found_again(steps: Steps, prepared: Store, tmp_path: Path) -> None:
    built = make(prepared, aliases=["prod"], verify=golden(2))
    manifest = built.manifest
    assert built.made
    assert steps.counts == {"verify": 1, "publish": 1}
    assert manifest.kind is BundleKind.TRTLLM_CHECKPOINT
    assert manifest.model.architecture == "LlamaForCausalLM"
    assert manifest.quantization.algorithm == "FP8"
    assert manifest.requires.gpus == 0  # no accelerator was asked for
    assert set(manifest.provenance.steps) == {*STEPS} - {"reference", "publish"}
    directory = NodeCache(tmp_path / "cache").fetch(prepared, manifest)
    runtime = json.loads((directory / "runtime.json").read_bytes())
    assert runtime["engine"] == {"kind": "trtllm", "max_batch_size": 5}
    for file in ("model/tokenizer.json", "tokenizer/config.json", "caches/names.txt", "certificates/tuning.json"):
        assert (directory / file).is_file()
    assert prepared.aliases("llama")["prod"].fingerprint == manifest.fingerprint
    again = make(prepared, BuildOptions("nowhere:1"), aliases=["prod"], verify=golden(2))
    assert (again.made, again.manifest) == (False, manifest)  # nobody was asked
    asked = make(prepared, BuildOptions("here", probe=True), aliases=["prod"], verify=golden(2))
    assert (asked.made, asked.manifest) == (False, manifest)
    assert steps.counts == {"verify": 1, "publish": 1}


@pytest.mark.parametrize("damage", ["blob", "manifest"])
def test_a_damaged_bundle_is_made_again_by_its_build(
    steps: Steps, prepared: Store, tmp_path: Path, damage: str
) -> None:
    (fingerprint,) = prepared.bundles()
    manifest = prepared.find_bundle(fingerprint)
    assert manifest is not None
    place = Path(prepared.url.removeprefix("file://"))
    runtime = next(entry for entry in manifest.files if entry.path == "runtime.json")
    lost = {"blob": place / blob_key(runtime.blake3), "manifest": place / f"bundles/{fingerprint}.json"}[damage]
    lost.chmod(0o644)
    lost.write_bytes(lost.read_bytes()[:-5])
    assert make(prepared).made
    assert steps.counts["publish"] == 1
    assert_right(prepared, tmp_path / "looked")
    assert len(prepared.versions("llama")) == 1
    assert not make(prepared).made


def test_an_engine_over_nodes_with_an_environment_of_its_own(
    machine: Path, steps: Steps, prepared: Store, tmp_path: Path
) -> None:
    env = {"py_executable": sys.executable, "env_vars": {ENVIRONMENT_VARIABLE: "the engine's"}}
    built = make(
        prepared,
        parallel={"tensor": 2, "pipeline": 2, "gpus_per_node": 2},
        target={**SMALL, "accelerator": "H100", "engine_env": env},
    )
    assert built.manifest.requires.gpus == 4
    verified = prepared.find_step(built.manifest.provenance.steps["verify"])
    assert verified is not None
    assert (verified.result["bundles"], verified.result["environment"]) == (2, "the engine's")
    # Neither the source nor the quantized checkpoint depends on the layout.
    assert steps.counts == {step: 1 for step in STEPS if step not in ("fetch", "quantize")}
    assert not list((machine / "cache/work").iterdir())


def test_a_refused_candidate_is_refused_until_it_is_verified_again(steps: Steps, prepared: Store) -> None:
    steps.refuse("accuracy drop 3.0 % > 1 %")
    for _ in range(2):
        with pytest.raises(GateRefused, match=r"accuracy drop 3.0 % > 1 %") as refused:
            make(prepared, verify=golden(3))
    assert "--retry" in str(refused.value)
    assert json.loads(Path(refused.value.log, "certificates/accuracy.json").read_bytes())["passed"] is False
    assert outline(inputs(verify=golden(3)), prepared, "here").refused is not None
    assert steps.counts == {"verify": 1}
    assert len(prepared.versions("llama")) == 1
    steps.refuse("another reason")
    with pytest.raises(GateRefused, match="another reason"):
        make(prepared, BuildOptions("here", retry=True), verify=golden(3))
    steps.accept()
    assert make(prepared, BuildOptions("here", retry=True), verify=golden(3)).made
    assert steps.counts == {"verify": 3, "publish": 1}


def test_a_failed_build_leads_to_its_fallback(steps: Steps, prepared: Store) -> None:
    steps.fail("compile", "failed")
    changes: dict[str, Any] = {"compile": {"max_batch_size": 7}, "aliases": ["prod"], "fallback": "transformers"}
    built = make(prepared, **changes)
    assert built.replaces == "step compile: it cannot be done"
    assert built.manifest.provenance.replaces == built.replaces
    assert built.manifest.kind is BundleKind.TRANSFORMERS_CHECKPOINT
    assert built.manifest.quantization.algorithm is None
    assert prepared.versions("llama")[-1].note.startswith("fallback: ")
    assert built.naming.aliases == ("prod",)  # it pointed to nothing
    # The next run tries again to make what was asked for.
    assert prepared.find_build(inputs(**changes).key) is None


@pytest.mark.parametrize(
    ("ends", "message", "is_mistake"),
    [
        (["accident", "failed"], "it cannot be done", False),
        (["mistake"], "use an even number", True),
    ],
)
def test_accidents_are_tried_again_and_failures_are_final(
    steps: Steps, prepared: Store, ends: list[str], message: str, is_mistake: bool
) -> None:
    steps.fail("verify", *ends)
    with pytest.raises(BuildFailed, match=f"step verify: .*{message}") as failed:
        make(prepared, verify=golden(6))
    assert steps.counts["verify"] == len(ends)
    assert failed.value.mistake is is_mistake
    assert "this is verify, for llama" in failed.value.tail
    assert "this is verify" in Path(failed.value.log).read_text()


def test_a_step_that_takes_too_long_is_ended(steps: Steps, prepared: Store) -> None:
    steps.hold("verify")
    with pytest.raises(BuildFailed, match=r"longer than target\.time_limit_s: 1,"):
        make(prepared, verify=golden(7), target={**SMALL, "time_limit_s": 1})
    pid = steps.wait_for("verify")
    until(lambda: not psutil.pid_exists(pid), "the step's process is left")


def test_a_cluster_without_room_says_what_it_has(steps: Steps, store: Store) -> None:
    with pytest.raises(ConfigError, match=r"no node has 'B200'. The cluster has node \w{8}: .*, GPU type H100"):
        make(store, target={"accelerator": "B200"})
    with pytest.raises(ConfigError, match=r"step reference: it takes 64 CPU of one node.*The cluster has node \w{8}"):
        make(store, target={"num_cpus": 64})
    assert not steps.begun


def test_an_outline_does_nothing(steps: Steps, store: Store, prepared: Store) -> None:
    assert set(outline(inputs(), store, "here").states.values()) == {StepState.RUN}
    states = outline(inputs(verify=golden(8)), prepared, "here").states
    assert [name.value for name, state in states.items() if state is StepState.RUN] == ["verify", "publish"]
    assert not steps.begun


def test_an_interrupted_build_ends_all_that_it_started(steps: Steps, store: Store, start: Start) -> None:
    """With a Ray of its own."""
    steps.hold("reference")
    program = start(store, "local")
    steps.wait_for("reference")
    started = [psutil.Process(program.pid), *psutil.Process(program.pid).children(recursive=True)]
    program.interrupt()
    assert program.wait() == (INTERRUPTED, "")
    gone, alive = psutil.wait_procs(started, timeout=WAIT_S)
    assert len(gone) > 4
    assert not alive
