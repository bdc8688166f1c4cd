"""Bundles on the nodes of a cluster: checked on each, downloaded once to each, and what replicas say meanwhile."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from serve.artifacts.bundle_source import BundleSource
from serve.artifacts.node_cache import NodeCache
from serve.cluster_kv import ClusterKeyValues
from serve.core.parallel import ParallelLayout
from serve.core.placement import PlacementPlan
from serve.engines.transformers.settings import TransformersSettings
from serve.errors import BundleMismatch
from serve.start_notes import StartNotes, starts_of
from serve.workers.bundle_access import ReplicaBundles
from serve.workers.bundle_nodes import BundleFetch, check_nodes, find_nodes
from serve.workers.group_settings import GroupSettings
from serve.workers.launch import EngineLaunch, plan_launch
from serve.workers.settings import RankResources
from tests.integration.counting_server import serve_counted
from tests.integration.group_cluster import GroupCluster, small_plan
from tests.unit.serving.bundles import ALIAS, NAME, Bundles

# Ray's cluster utilities leave sockets to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

REPLICAS = 8
ALONE = plan_launch(TransformersSettings(), ParallelLayout(), RankResources(num_cpus=0.01), mpi_works=lambda: True)
TWO_NODES = small_plan(ParallelLayout(pipeline=2, gpus_per_node=1))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GroupCluster]:
    running = GroupCluster(tmp_path_factory.mktemp("nodes"))
    try:
        running.add_node(gpus=1)
        running.add_node(gpus=1)
        yield running
    finally:
        running.end()


@pytest.fixture
def bundles(tmp_path: Path) -> Bundles:
    return Bundles(tmp_path)


class StartingReplica:
    """What a replica does before it starts an engine.

    Args:
        number: Of the replica.
        bundle: To be started from.
        plan: What it has reserved.
        root: Of its node's cache.
    """

    def __init__(self, number: int, bundle: BundleSource, plan: PlacementPlan, root: Path) -> None:
        self._launch = EngineLaunch(TransformersSettings(), "", plan, None, GroupSettings(), bundle)
        self._bundle = bundle
        self._cache = NodeCache(root)
        self._notes = StartNotes(ClusterKeyValues(), "llm", "model-m", f"replica-{number}")

    async def ready(self) -> None:
        """Return once it is there."""

    async def prepare(self) -> Path:
        """Check the nodes, and download."""
        return await ReplicaBundles(self._notes, self._cache).prepare(self._launch)

    async def fetch(self) -> tuple[int, str]:
        """Download to all nodes; return how many there are besides its own, and what would be told."""
        nodes = await asyncio.to_thread(find_nodes, self._launch)
        fetch = BundleFetch(self._bundle, nodes, self._cache)
        await fetch.run()
        text = await fetch.text(time.monotonic())
        fetch.close()
        return len(nodes.others), text

    async def check(self) -> None:
        """Check the nodes."""
        await check_nodes(self._launch, self._bundle, await asyncio.to_thread(find_nodes, self._launch))

    async def say(self, text: str, until: Any) -> None:
        """Say something until an object is there."""
        self._notes.say(text)
        with self._notes.kept():
            await until[0]


def test_eight_replicas_that_start_on_one_node_download_once(
    cluster: GroupCluster, bundles: Bundles, tmp_path: Path
) -> None:
    manifest = bundles.publish("v1")
    pinned = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    with serve_counted(bundles.path) as server:
        bundle = BundleSource(server.url, NAME, ALIAS, manifest)
        replicas = [
            Starting.options(scheduling_strategy=pinned).remote(number, bundle, ALONE, tmp_path / "cache")
            for number in range(REPLICAS)
        ]
        ray.get([replica.ready.remote() for replica in replicas])  # so that all of them begin together
        directories = set(ray.get([replica.prepare.remote() for replica in replicas]))
    assert len(directories) == 1
    assert (directories.pop() / "model/config.json").read_text() == '{"label": "v1"}'
    assert {path: count for path, count in server.reads.items() if count != 1} == {}
    assert len(server.reads) == len({entry.blake3 for entry in manifest.files})
    for replica in replicas:
        ray.kill(replica)


def test_every_node_of_a_launch_is_checked_and_gets_the_files(
    cluster: GroupCluster, bundles: Bundles, tmp_path: Path
) -> None:
    manifest = bundles.publish("v1")
    wanting = bundles.publish("v2", requires={"gpus": 2, "gpu_name": "NVIDIA H100 80GB HBM3"})
    group = placement_group([dict(bundle) for bundle in TWO_NODES.bundles], TWO_NODES.strategy)
    ray.get(group.ready())
    inside = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=False)

    def start(number: int, source: BundleSource) -> Any:
        options = Starting.options(scheduling_strategy=inside)
        return options.remote(number, source, TWO_NODES, tmp_path / "cache")

    good, bad = (start(n, BundleSource(bundles.store.url, NAME, ALIAS, m)) for n, m in enumerate((manifest, wanting)))
    try:
        ray.get(good.check.remote())
        others, text = ray.get(good.fetch.remote())
        assert others == 1
        assert text.startswith(f"downloading bundle {NAME}@{ALIAS} {manifest.fingerprint[:12]}: 100 % of ")
        assert text.endswith(", 2 nodes")
        # These nodes only say that they have GPUs: their ranks would find none.
        with pytest.raises(BundleMismatch, match=r"takes 1 GPUs of this node, and 0 may be used"):
            ray.get(bad.check.remote())
    finally:
        ray.kill(good)
        ray.kill(bad)
        remove_placement_group(group)


def test_what_a_starting_replica_says_is_heard_in_the_whole_cluster(
    cluster: GroupCluster, bundles: Bundles, tmp_path: Path
) -> None:
    bundle = BundleSource(bundles.store.url, NAME, ALIAS, bundles.publish("v1"))
    replica = Starting.remote(9, bundle, ALONE, tmp_path / "cache")
    said = Gates.remote()
    speaking = replica.say.remote("downloading: 34 %", [said.passed.remote()])
    values = ClusterKeyValues()
    _until(lambda: starts_of(values, "llm", time.time()).get("model-m") == ["downloading: 34 %"])
    ray.get(said.open.remote())
    ray.get(speaking)
    _until(lambda: not values.keys("start/llm/"))
    ray.kill(replica)
    ray.kill(said)


class Gate:
    """Something to wait for."""

    def __init__(self) -> None:
        self._open = asyncio.Event()

    async def open(self) -> None:
        """Let whoever waits go on."""
        self._open.set()

    async def passed(self) -> None:
        """Wait until it is open."""
        await self._open.wait()


Starting, Gates = ray.remote(num_cpus=0.01)(StartingReplica), ray.remote(num_cpus=0.01)(Gate)


def _until(condition: Any) -> None:
    """Wait for what another process does; nothing announces it."""
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
