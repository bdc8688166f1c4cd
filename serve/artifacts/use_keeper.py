"""UseKeeper: says again and again that a process uses bundles, so that no garbage collection removes them."""

import asyncio
import logging
from collections.abc import Callable, Iterable

from serve.artifacts.bundle_source import BundleSource
from serve.artifacts.port import ArtifactStore

logger = logging.getLogger(__name__)

_RETRY_S = 60.0


class UseKeeper:
    """Renews the leases of some bundles, until it is stopped; then they run out.

    Args:
        open_store: Opens a store by its URL.
        holder: Who uses them, for people.
        lease_s: How long a lease is; it is renewed four times in this time.
    """

    def __init__(self, open_store: Callable[[str], ArtifactStore], holder: str, lease_s: float) -> None:
        self._open_store = open_store
        self._holder = holder
        self._lease_s = lease_s
        self._task: asyncio.Task[None] | None = None

    def start(self, bundles: Iterable[BundleSource]) -> None:
        """Begin, on the running loop; what was kept before is not any more."""
        self.stop()
        wanted = {(bundle.store, bundle.fingerprint) for bundle in bundles}
        if wanted:
            self._task = asyncio.get_running_loop().create_task(self._run(sorted(wanted)))

    def stop(self) -> None:
        """Stop. Safe to call twice."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _run(self, wanted: list[tuple[str, str]]) -> None:
        period_s, said = self._lease_s / 4, ""
        while True:
            try:
                await asyncio.to_thread(self._renew, wanted)
                wait_s, said = period_s, ""
            except Exception as exc:  # a store that may not be written to, for instance: what runs goes on
                wait_s = min(period_s, _RETRY_S)
                if str(exc) != said:
                    said = str(exc)
                    logger.warning("The store could not be told that %s uses a bundle: %s", self._holder, exc)
            await asyncio.sleep(wait_s)

    def _renew(self, wanted: list[tuple[str, str]]) -> None:
        for url, fingerprint in wanted:
            self._open_store(url).use(fingerprint, self._holder, self._lease_s)
