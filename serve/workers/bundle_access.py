"""ReplicaBundles: what a starting replica does with bundles and their stores."""

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from datetime import datetime
from functools import partial
from pathlib import Path

from serve.artifacts.alias_history import rejected_bundles
from serve.artifacts.bundle_source import BundleSource
from serve.artifacts.node_cache import NodeCache
from serve.artifacts.port import AliasMove, ArtifactStore
from serve.artifacts.store import open_store
from serve.errors import ConfigError, RayTRTError
from serve.start_notes import PERIOD_S, StartNotes
from serve.workers.bundle_nodes import BundleFetch, check_nodes, find_nodes
from serve.workers.launch import EngineLaunch

logger = logging.getLogger(__name__)

_HISTORY_LIMIT_S = 60.0


class ReplicaBundles:
    """`serve.workers.starting.BundleAccess` of one replica.

    Args:
        notes: Of the replica.
        cache: Of its node.
        stores: Opens a store by its URL.
    """

    def __init__(
        self, notes: StartNotes, cache: NodeCache | None = None, stores: Callable[[str], ArtifactStore] = open_store
    ) -> None:
        self._notes = notes
        self._cache = cache
        self._open_store = stores
        self._fetches: list[BundleFetch] = []

    def say(self, text: str) -> None:
        """Tell gateways what the start is doing."""
        self._notes.say(text)

    async def rejected(self, bundle: BundleSource) -> Collection[str]:
        """Return what the alias's history says was rejected, and what replicas of this deployment have noted."""
        if bundle.alias is None:
            return ()
        noted = await asyncio.to_thread(self._notes.rejections)
        try:
            async with asyncio.timeout(_HISTORY_LIMIT_S):
                store = self._open_store(bundle.store)
                history = await asyncio.to_thread(store.history, bundle.name, bundle.alias)
        except (RayTRTError, TimeoutError) as exc:
            # Its files may be on this node: a store that is away for a while stops no replica.
            logger.warning("The history of bundle %s cannot be read: %s", bundle, exc)
            return set(noted)
        promoted = {move.fingerprint: _at_s(move) for move in history if move.rejected is None}
        return rejected_bundles(history) | {
            fingerprint for fingerprint, at_s in noted.items() if promoted.get(fingerprint, 0.0) < at_s
        }

    async def prepare(self, launch: EngineLaunch) -> Path:
        """Check every node of the launch, then bring the bundle there; see the port."""
        bundle = launch.bundle
        assert bundle is not None
        nodes = await asyncio.to_thread(find_nodes, launch)
        if launch.certified is not None:
            self.say(f"checking what bundle {bundle} requires")
            await check_nodes(launch, bundle, nodes)
        if self._cache is None:
            self._cache = await asyncio.to_thread(NodeCache)
        fetch = BundleFetch(bundle, nodes, self._cache)
        self._fetches.append(fetch)
        running = asyncio.create_task(fetch.run())
        began_s = time.monotonic()
        try:
            while not running.done():
                self.say(await fetch.text(time.monotonic()))
                await asyncio.wait([running], timeout=PERIOD_S)
        finally:
            running.cancel()
        directory = running.result()
        logger.info("Bundle %s is in %s after %.1f s.", bundle, directory, time.monotonic() - began_s)
        return directory

    async def failed_elsewhere(self, bundle: BundleSource) -> int:
        """Return how many starts of a bundle have failed in other replicas of this deployment, lately."""
        return await asyncio.to_thread(self._notes.failures_elsewhere, bundle.fingerprint)

    async def note_failure(self, bundle: BundleSource) -> None:
        """Let other replicas know that a start of a bundle has failed here."""
        await asyncio.to_thread(self._notes.note_failure, bundle.fingerprint)

    async def note_success(self, bundle: BundleSource) -> None:
        """Let other replicas know that a bundle works here."""
        await asyncio.to_thread(self._notes.note_success, bundle.fingerprint)

    async def has_worked(self, bundle: BundleSource) -> bool:
        """Return whether some replica of this deployment has started with a bundle."""
        return await asyncio.to_thread(self._notes.has_worked, bundle.fingerprint)

    async def reject(self, bundle: BundleSource, reason: str) -> None:
        """Move the bundle's alias back, so that no other replica tries it."""
        await asyncio.to_thread(self._notes.note_rejection, bundle.fingerprint)
        assert bundle.alias is not None
        try:
            store = self._open_store(bundle.store)
            roll_back = partial(store.roll_back, bundle.name, bundle.alias, reason=reason, rejected=bundle.fingerprint)
            move = await asyncio.to_thread(roll_back)
        except ConfigError as exc:
            logger.error("Bundle %s is rejected, and its alias stays: %s", bundle, exc)
        except RayTRTError as exc:
            logger.error("Bundle %s is rejected; its alias could not be moved back: %s", bundle, exc)
        else:
            logger.error(
                "Bundle %s is rejected: %s@%s now points to %s.",
                bundle,
                bundle.name,
                bundle.alias,
                move.fingerprint[:12],
            )

    def close(self) -> None:
        """Let files on other nodes go: they have been loaded."""
        for fetch in self._fetches:
            fetch.close()
        self._fetches.clear()


def _at_s(move: AliasMove) -> float:
    try:
        return datetime.fromisoformat(move.created).timestamp()
    except ValueError:
        return 0.0
