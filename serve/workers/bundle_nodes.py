"""The nodes of a launch: what they have for its bundle, and its files on each of them.

Neither takes GPU memory: the driver is asked what there is, and files are copied to disk.
"""

import asyncio
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError, RuntimeEnvSetupError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from serve.artifacts.bundle_source import BundleSource
from serve.artifacts.check import check_requirements
from serve.artifacts.node_cache import NodeCache
from serve.artifacts.node_facts import NodeFacts
from serve.artifacts.node_probe import probe_node
from serve.artifacts.store import open_store
from serve.errors import BundleMismatch, ConfigError, RayTRTError, StoreUnavailable
from serve.workers.download_text import Transfer, download_text
from serve.workers.fact_probe import library_versions, node_facts
from serve.workers.launch import EngineLaunch

PROBE_LIMIT_S = 180.0  # an environment may have to be made first
_ASK_S = 10.0


@dataclass(frozen=True)
class LaunchNodes:
    """Where the ranks of a launch will be.

    Attributes:
        here: Id of the replica's node.
        bundles: Node id to one bundle of the placement group there that holds ranks; None: the replica holds them.
        group: The placement group; None: there is none, as the replica takes everything itself.
    """

    here: str
    bundles: Mapping[str, int | None]
    group: Any = None

    @property
    def others(self) -> list[str]:
        """The nodes besides the replica's."""
        return [node for node in self.bundles if node != self.here]


def find_nodes(launch: EngineLaunch) -> LaunchNodes:
    """Find out where the ranks of a launch will be; called in its replica. Blocks for milliseconds."""
    here = ray.get_runtime_context().get_node_id()
    group = ray.util.get_current_placement_group()
    if len(launch.plan.bundles) == 1 or group is None:
        return LaunchNodes(here, {here: None})
    placed = ray.util.placement_group_table(group)["bundles_to_node_id"]
    nodes: dict[str, int | None] = {}
    for index, ranks in enumerate(launch.plan.bundle_ranks):
        if ranks:
            nodes.setdefault(placed[index], index)
    return LaunchNodes(here, nodes, group)


async def check_nodes(launch: EngineLaunch, bundle: BundleSource, nodes: LaunchNodes) -> None:
    """Check that every node of a launch has what the bundle requires, in the engine's own environment.

    Raises:
        BundleMismatch: One does not; names both sides.
    """
    requires = bundle.manifest.requires
    reserved = sum(resources.get("GPU", 0.0) for resources in launch.plan.bundles)
    if requires.gpus and not reserved:
        raise BundleMismatch(
            f"bundle {bundle} computes on {requires.gpus} GPUs, and its replica reserves none; remove "
            "resources.num_gpus"
        )
    facts = await asyncio.gather(*(_facts(launch, nodes, node) for node in nodes.bundles))
    for node, found in zip(nodes.bundles, facts, strict=True):
        # How many there are in all was decided with the layout, which the configuration may have changed.
        gpus = math.ceil(launch.plan.bundles[nodes.bundles[node] or 0].get("GPU", 0.0)) if requires.gpus else 0
        check_requirements(requires, found, gpus=gpus, subject=f"node {node[:8]}: bundle {bundle}")


async def _facts(launch: EngineLaunch, nodes: LaunchNodes, node: str) -> NodeFacts:
    """Ask a node, with the GPUs that the first of its ranks will have; libraries are those of the engine's environment.

    An environment may be a container that sees neither driver nor GPUs before it is given some.
    """
    index = nodes.bundles[node]
    if index is None:
        return await asyncio.to_thread(probe_node)
    there = {"num_cpus": 0, "scheduling_strategy": PlacementGroupSchedulingStrategy(nodes.group, index)}
    gpus = launch.plan.bundles[index].get("GPU", 0.0)
    try:
        async with asyncio.timeout(PROBE_LIMIT_S):
            facts: NodeFacts = await node_facts.options(**there, num_gpus=gpus).remote()
            if launch.env is None:
                return facts
            runtime_env = launch.env.to_runtime_env({})
            libraries = await library_versions.options(**there, runtime_env=runtime_env).remote()
    except TimeoutError:
        raise StoreUnavailable(f"node {node[:8]} does not say what it has within {PROBE_LIMIT_S:.0f} s") from None
    except RuntimeEnvSetupError as exc:
        assert launch.env is not None
        raise ConfigError(f"engine_env.{launch.env.place}: Ray cannot set it up: {exc}") from exc
    except RayError as exc:
        raise StoreUnavailable(f"node {node[:8]} does not say what it has: {exc}") from exc
    return facts.model_copy(update={"libraries": libraries})


class BundleFiles:
    """The files of a bundle on one node, for as long as this actor lives: no lack of room removes them meanwhile.

    Args:
        root: Of the node's cache; the same on all nodes of a launch, so that all ranks find the files at one path.
    """

    def __init__(self, root: Path) -> None:
        self._cache = NodeCache(root)
        self._done = (0, 0)

    def fetch(self, bundle: BundleSource) -> Path:
        """Bring the files here, unless they are; returns their directory."""
        return self._cache.fetch(open_store(bundle.store), bundle.manifest, self._note)

    def progress(self) -> tuple[int, int]:
        """Return bytes that are here, and in all."""
        return self._done

    def _note(self, done: int, total: int) -> None:
        self._done = (done, total)


_BundleFilesActor = ray.remote(num_cpus=0, max_restarts=0, max_concurrency=2)(BundleFiles)


class BundleFetch:
    """A bundle on its way to all nodes of a launch. The files are safe until `close`.

    Args:
        bundle: Which one.
        nodes: Where to.
        cache: Of this node.
    """

    def __init__(self, bundle: BundleSource, nodes: LaunchNodes, cache: NodeCache) -> None:
        self._bundle = bundle
        self._local = Transfer(time.monotonic())
        self._transfers = {nodes.here: self._local}
        self._cache = cache
        self._actors: dict[str, Any] = {
            node: _BundleFilesActor.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote(cache.root)
            for node in nodes.others
        }
        for node in self._actors:
            self._transfers[node] = Transfer(time.monotonic())

    async def run(self) -> Path:
        """Bring the files to every node; returns their directory, which is the same on all of them.

        Raises:
            BundleCorrupt: The store has others than the manifest says.
            StoreUnavailable: The store, or a node, does not answer.
            ConfigError: There is no room on a disk.
        """
        store = open_store(self._bundle.store)
        local = asyncio.to_thread(self._cache.fetch, store, self._bundle.manifest, self._local.note)
        others = asyncio.gather(*(self._fetch_there(node) for node in self._actors))
        directory, _ = await asyncio.gather(local, others)
        return directory

    async def text(self, now_s: float) -> str:
        """Return how far it is, for people."""
        for node, actor in self._actors.items():
            try:
                async with asyncio.timeout(_ASK_S):
                    self._transfers[node].note(*await actor.progress.remote())
            except (RayError, TimeoutError):
                continue
        return download_text(self._bundle, list(self._transfers.values()), now_s)

    def close(self) -> None:
        """Let the files on other nodes go."""
        for actor in self._actors.values():
            ray.kill(actor)

    async def _fetch_there(self, node: str) -> None:
        try:
            await self._actors[node].fetch.remote(self._bundle)
        except RayTaskError as exc:
            if isinstance(exc.cause, RayTRTError):
                raise exc.cause from exc
            raise StoreUnavailable(f"node {node[:8]}: {type(exc.cause).__name__}: {exc.cause}") from exc
        except RayError as exc:
            raise StoreUnavailable(f"node {node[:8]} was lost while it downloaded: {exc}") from exc
