"""How a replica comes to an engine that serves: which failures are answered by what, and what others learn of them."""

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from serve.artifacts.bundle_source import BundleSource
from serve.artifacts.certificates import GoldenSample
from serve.artifacts.manifest import GOLDEN
from serve.core.parallel import ParallelLayout
from serve.core.request import GenerateRequest, SamplingParams, pack_tokens
from serve.engines.factory import AnyEngineSettings
from serve.engines.simulated.engine import SimulatedEngine
from serve.engines.simulated.settings import SimulatedSettings
from serve.engines.transformers.settings import TransformersSettings
from serve.errors import BundleCorrupt, BundleMismatch, ConfigError, EngineDead, StoreUnavailable
from serve.workers.bundle_settings import BundleSettings
from serve.workers.golden import GoldenMismatch
from serve.workers.group import WorkerGroup
from serve.workers.group_settings import GroupSettings
from serve.workers.launch import EngineLaunch, LaunchChain, plan_launch
from serve.workers.settings import RankResources
from serve.workers.starting import EngineStart, Started
from tests.unit.workers.fake_bundles import FakeBundles, source_of
from tests.unit.workers.fake_launcher import FakeLauncher

WATCH = GroupSettings(heartbeat_s=0.05, heartbeat_limit_s=0.2, end_grace_s=0.1, lease_s=1.0)
FAST = SimulatedSettings(speed=0)
NEW, OLD = source_of("b"), source_of("a")
PROMPT = (3, 1, 4, 1, 5)
LENGTH = 20


def launch(name: str, bundle: BundleSource | None = None, *, own_process: bool = True) -> EngineLaunch:
    """Return a launch that is known by its model directory."""
    engine: AnyEngineSettings = SimulatedSettings() if bundle is None else TransformersSettings()
    plan = plan_launch(engine, ParallelLayout(), RankResources(), mpi_works=lambda: True, own_process=own_process)
    return EngineLaunch(engine, name, plan, None, WATCH, bundle)


def chain(*launches: EngineLaunch, samples: int = 0) -> LaunchChain:
    return LaunchChain(launches, 2, BundleSettings(golden_samples=samples))


class Replicas:
    """Replicas of one deployment, started one after the other.

    Args:
        bundles: What they share.
    """

    def __init__(self, bundles: FakeBundles) -> None:
        self.tried: list[str] = []
        self.errors: dict[str, Exception] = {}
        self.bundles = bundles
        self._launchers: list[FakeLauncher] = []
        self._groups: list[WorkerGroup] = []

    async def start(self, of: LaunchChain) -> Started:
        return await EngineStart("m", of, self._make_group, self.bundles).run()

    def _make_group(self, asked: EngineLaunch) -> WorkerGroup:
        name = asked.model_dir
        self.tried.append(name if asked.bundle is None else Path(name).parent.name[0])
        self._launchers.append(FakeLauncher(SimulatedEngine(FAST), error=self.errors.get(self.tried[-1]), world_size=1))
        self._groups.append(WorkerGroup(self._launchers[-1], WATCH))
        return self._groups[-1]

    async def end(self) -> None:
        for group in self._groups:
            await group.stop()
        for launcher in self._launchers:
            launcher.collect()


@pytest.fixture
async def replicas(tmp_path: Path) -> AsyncIterator[Replicas]:
    replicas = Replicas(FakeBundles(tmp_path))
    yield replicas
    await replicas.end()


@pytest.mark.parametrize(
    ("error", "tries"), [(ConfigError("no such model"), 1), (EngineDead("lost"), 2), (ImportError("libcuda"), 2)]
)
async def test_any_failure_is_answered_by_the_fallback(replicas: Replicas, error: Exception, tries: int) -> None:
    replicas.errors["configured"] = error
    started = await replicas.start(chain(launch("configured"), launch("fallback")))
    assert started.stands_in
    assert replicas.tried == ["configured"] * tries + ["fallback"]


async def test_without_a_fallback_a_replica_tries_once(replicas: Replicas) -> None:
    replicas.errors["configured"] = EngineDead("lost")
    with pytest.raises(EngineDead, match="lost"):
        await replicas.start(chain(launch("configured")))
    assert replicas.tried == ["configured"]


async def test_a_bundle_is_prepared_on_its_nodes_and_started_from_there(replicas: Replicas) -> None:
    started = await replicas.start(chain(launch("", NEW), launch("", OLD), launch("fallback")))
    assert (started.stands_in, started.launch.bundle) == (False, NEW)
    assert (replicas.tried, replicas.bundles.prepared) == (["b"], [NEW.fingerprint])
    assert not replicas.bundles.history


@pytest.mark.parametrize("own_process", [True, False])
@pytest.mark.parametrize(("error", "rejects"), [(BundleMismatch("H100, L4"), False), (BundleCorrupt("a byte"), True)])
async def test_a_bundle_that_cannot_be_loaded_is_left_before_anything_starts_and_rejected_if_it_is_its_fault(
    replicas: Replicas, error: Exception, rejects: bool, own_process: bool, caplog: pytest.LogCaptureFixture
) -> None:
    replicas.bundles.refused[NEW.fingerprint] = error
    with caplog.at_level(logging.ERROR):
        of = chain(launch("", NEW, own_process=own_process), launch("", OLD, own_process=own_process))
        started = await replicas.start(of)
    assert (started.stands_in, started.launch.bundle) == (True, OLD)
    assert replicas.tried == ["a"]
    assert replicas.bundles.history == ([(NEW.fingerprint, f"m did not start from it: {error}")] if rejects else [])
    assert f"m falls back to bundle tiny {OLD.fingerprint[:12]}." in caplog.text


async def test_later_replicas_do_not_try_what_was_rejected(replicas: Replicas) -> None:
    replicas.bundles.history.append((NEW.fingerprint, "it babbles"))
    started = await replicas.start(chain(launch("", NEW), launch("", OLD)))
    assert (started.stands_in, replicas.tried) == (True, ["a"])
    with pytest.raises(BundleMismatch, match=r"bundle tiny@prod bbbbbbbbbbbb was rejected.*raytrt deploy`"):
        await replicas.start(chain(launch("", NEW)))
    assert replicas.tried == ["a"]


async def test_a_fallback_may_load_the_files_of_a_bundle_whose_engine_failed(replicas: Replicas) -> None:
    compiled = source_of("c", kind="trtllm-checkpoint")
    first = launch("", compiled)
    assert first.certified is None  # by a transformers engine: this is what the fallback's launch looks like
    replicas.bundles.history.append((compiled.fingerprint, "it does not start"))
    started = await replicas.start(chain(first))
    assert not started.stands_in


async def test_an_engine_in_the_replicas_own_process_leaves_the_rest_to_the_next_replica(replicas: Replicas) -> None:
    of = chain(launch("", NEW, own_process=False), launch("", OLD, own_process=False))
    replicas.errors["b"] = EngineDead("no memory")
    for _ in range(2):
        with pytest.raises(EngineDead):
            await replicas.start(of)
    assert replicas.tried == ["b", "b"]
    assert [fingerprint for fingerprint, _ in replicas.bundles.history] == [NEW.fingerprint]
    assert (await replicas.start(of)).launch.bundle == OLD


async def test_a_store_that_does_not_answer_is_no_fault_of_the_bundle(replicas: Replicas) -> None:
    replicas.bundles.refused[NEW.fingerprint] = StoreUnavailable("503")
    with pytest.raises(StoreUnavailable):
        await replicas.start(chain(launch("", NEW)))
    started = await replicas.start(chain(launch("", NEW), launch("fallback")))
    assert started.stands_in
    assert replicas.bundles.prepared == [NEW.fingerprint] * 3
    assert not replicas.bundles.history


async def test_a_bundle_that_works_elsewhere_is_not_rejected_because_of_one_node(replicas: Replicas) -> None:
    of = chain(launch("", NEW), launch("", OLD))
    assert not (await replicas.start(of)).stands_in
    replicas.bundles.refused[NEW.fingerprint] = BundleCorrupt("a byte, on its way")
    assert (await replicas.start(of)).stands_in
    assert not replicas.bundles.history


async def test_a_start_that_worked_ends_the_count_of_failures(replicas: Replicas) -> None:
    of = chain(launch("", NEW, own_process=False), launch("", OLD, own_process=False))
    replicas.errors["b"] = EngineDead("no memory")
    with pytest.raises(EngineDead):
        await replicas.start(of)
    replicas.errors.clear()
    await replicas.start(of)
    assert replicas.bundles.failures[NEW.fingerprint] == 0


async def test_a_bundle_that_was_asked_for_exactly_is_not_rolled_back(replicas: Replicas) -> None:
    pinned = source_of("d", alias=None)
    replicas.bundles.refused[pinned.fingerprint] = BundleMismatch("H100, L4")
    with pytest.raises(BundleMismatch):
        await replicas.start(chain(launch("", pinned)))
    assert not replicas.bundles.history


@pytest.fixture
async def golden(tmp_path: Path) -> GoldenSample:
    """What the engine says, written into the certificate of the new bundle."""
    engine = SimulatedEngine(FAST)
    await engine.start()
    request = GenerateRequest("g", "m", pack_tokens(PROMPT), SamplingParams(temperature=0, max_tokens=LENGTH))
    tokens = [token async for delta in engine.generate(request) for token in delta.token_ids]
    await engine.stop()
    return GoldenSample(prompt=PROMPT, tokens=tuple(tokens))


def certify(directory: Path, bundle: BundleSource, sample: GoldenSample) -> None:
    path = directory / bundle.fingerprint / GOLDEN
    path.parent.mkdir(parents=True)
    path.write_text(sample.model_dump_json() + "\n")


async def test_an_engine_that_babbles_is_stopped_and_its_bundle_rejected(
    replicas: Replicas, golden: GoldenSample, tmp_path: Path
) -> None:
    babble = golden.model_copy(update={"tokens": tuple(token + 1 for token in golden.tokens)})
    certify(tmp_path, NEW, babble)
    certify(tmp_path, OLD, golden)
    started = await replicas.start(chain(launch("", NEW), launch("", OLD), samples=4))
    assert (replicas.tried, started.launch.bundle) == (["b", "a"], OLD)
    assert "min_golden_agreement" in replicas.bundles.history[0][1]
    replicas.bundles.history.clear()
    stained = launch("", NEW, own_process=False)
    with pytest.raises(GoldenMismatch):
        await replicas.start(chain(stained, launch("", OLD, own_process=False), samples=4))
    assert len(replicas.bundles.history) == 1


async def test_an_engine_that_says_what_it_said_is_put_to_work(
    replicas: Replicas, golden: GoldenSample, tmp_path: Path
) -> None:
    certify(tmp_path, NEW, golden)
    assert not (await replicas.start(chain(launch("", NEW), samples=4))).stands_in
    assert any("golden" in text for text in replicas.bundles.said)
