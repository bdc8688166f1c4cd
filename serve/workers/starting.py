"""From a chain of launches to an engine that serves: what was configured, else an earlier bundle, else the fallback.

What follows a failure is decided by `serve.core.launch_chain`; here it is carried out.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from serve.artifacts.bundle_source import BundleSource
from serve.artifacts.manifest import MODEL
from serve.core.launch_chain import FailedStart, Fault, after_failure, first_link
from serve.errors import BundleCorrupt, BundleMismatch, ConfigError, StoreUnavailable
from serve.workers.golden import GoldenMismatch, read_golden, repeat_golden
from serve.workers.group import WorkerGroup
from serve.workers.launch import EngineLaunch, LaunchChain

logger = logging.getLogger(__name__)


class BundleAccess(Protocol):
    """What a start needs of bundles and their store. None of it blocks the event loop."""

    def say(self, text: str) -> None:
        """Tell gateways what the start is doing."""

    async def rejected(self, bundle: BundleSource) -> Collection[str]:
        """Return the fingerprints that were rejected, by the history of the bundle's alias; nothing, if unknown."""

    async def prepare(self, launch: EngineLaunch) -> Path:
        """Check every node of the launch, download its bundle there, and return the bundle's directory.

        Raises:
            BundleMismatch, BundleCorrupt: A node, or the bundle, is not what it should be.
            StoreUnavailable: The store does not answer.
        """

    async def failed_elsewhere(self, bundle: BundleSource) -> int:
        """Return how many starts of a bundle have failed in other replicas of this deployment, lately."""

    async def note_failure(self, bundle: BundleSource) -> None:
        """Let other replicas know that a start of a bundle has failed here."""

    async def note_success(self, bundle: BundleSource) -> None:
        """Let other replicas know that a bundle works here."""

    async def has_worked(self, bundle: BundleSource) -> bool:
        """Return whether some replica of this deployment has started with a bundle."""

    async def reject(self, bundle: BundleSource, reason: str) -> None:
        """Move the bundle's alias back, so that no other replica tries it."""


@dataclass(frozen=True)
class Started:
    """An engine that serves.

    Attributes:
        group: Of it.
        launch: How it was started.
        link: Which launch of the chain that is.
    """

    group: WorkerGroup
    launch: EngineLaunch
    link: int

    @property
    def bundle(self) -> BundleSource | None:
        """The bundle that it was made from; None: it is none, or a fallback that only borrowed a bundle's files."""
        return self.launch.certified

    @property
    def stands_in(self) -> bool:
        """Whether it is not what was configured, or a bundle that its build has put in the place of another."""
        return self.link > 0 or (self.bundle is not None and self.bundle.manifest.provenance.replaces is not None)

    def describe(self, engine: str) -> str:
        """Return what serves, for people.

        Args:
            engine: Name and version of the engine.
        """
        return engine if self.bundle is None else f"{engine} with bundle {self.bundle.name} {self.bundle.fingerprint}"


class EngineStart:
    """One replica's start.

    Each try leaves nothing behind before the next begins. Where an engine lives in the replica's process there is but
    one try: Serve makes a new replica after it, in a new process, which goes on with the chain.

    Args:
        model_id: For the log.
        chain: What is tried.
        make_group: Makes the group of a launch.
        bundles: Access to them; None: no launch of the chain has one.
    """

    def __init__(
        self,
        model_id: str,
        chain: LaunchChain,
        make_group: Callable[[EngineLaunch], WorkerGroup],
        bundles: BundleAccess | None = None,
    ) -> None:
        self._model_id = model_id
        self._chain = chain
        self._make_group = make_group
        self._bundles = bundles
        self._failures: Counter[int] = Counter()
        self._stained = False

    async def run(self) -> Started:
        """Start the engine.

        Raises:
            Exception: What the last try failed of.
        """
        link: int | None = await self._first_link()
        while True:
            assert link is not None
            launch = self._chain.launches[link]
            try:
                return Started(await self._try(launch), launch, link)
            except Exception as exc:  # whatever it was, the next of the chain may serve
                link = await self._after(link, exc)
                if link is None:
                    raise
                if link > 0:
                    logger.error("%s falls back to %s.", self._model_id, describe(self._chain.launches[link]))

    async def _first_link(self) -> int:
        launches = self._chain.launches
        first = launches[0].certified
        rejected = await self._bundles.rejected(first) if self._bundles is not None and first is not None else ()
        link = first_link([_fingerprint(launch) for launch in launches], rejected)
        if link is None:
            assert first is not None
            raise BundleMismatch(
                f"{self._model_id}: bundle {first} was rejected by replicas that tried it, and nothing else was "
                "deployed for this model; `raytrt deploy` its configuration again, with what the alias points to now"
            )
        if link > 0:
            logger.warning(
                "%s: bundle %s was rejected; this replica begins with %s.",
                self._model_id,
                first,
                describe(launches[link]),
            )
        return link

    async def _try(self, launch: EngineLaunch) -> WorkerGroup:
        if launch.bundle is None or self._bundles is None:
            return await self._start_group(launch)
        directory = await self._bundles.prepare(launch)
        self._bundles.say(f"starting bundle {launch.bundle}")
        group = await self._start_group(replace(launch, model_dir=str(directory / MODEL)))
        if launch.certified is not None:
            try:
                await self._repeat_golden(group, launch.certified, directory)
            except BaseException:
                await group.stop()
                raise
            await self._bundles.note_success(launch.certified)
        return group

    async def _start_group(self, launch: EngineLaunch) -> WorkerGroup:
        self._stained |= launch.stains
        group = self._make_group(launch)
        try:
            await group.start()
        except Exception:
            await group.stop()
            raise
        return group

    async def _repeat_golden(self, group: WorkerGroup, bundle: BundleSource, directory: Path) -> None:
        check = self._chain.bundle_check
        if not check.golden_samples:
            return
        assert self._bundles is not None
        self._bundles.say(f"repeating golden samples of bundle {bundle}")
        samples = read_golden(directory)[: check.golden_samples]
        if not samples:
            logger.warning("%s: bundle %s has no golden samples; its answers are not checked.", self._model_id, bundle)
            return
        share = await repeat_golden(
            self._model_id, group.generate, samples, check.min_golden_agreement, check.golden_timeout_s
        )
        logger.info(
            "%s: bundle %s repeats its golden samples: %.1f %% of tokens agree.", self._model_id, bundle, 100 * share
        )

    async def _after(self, link: int, exc: Exception) -> int | None:
        """Note a failure; return which launch to try next."""
        launches, most = self._chain.launches, self._chain.max_failures
        launch, fault = launches[link], fault_of(exc)
        bundle = launch.certified
        self._failures[link] += 1
        failures = self._failures[link]
        if self._bundles is not None and bundle is not None and fault is Fault.ENGINE:
            await self._bundles.note_failure(bundle)
            failures += await self._bundles.failed_elsewhere(bundle) if self._stained else 0
        which = f" (try {failures} of {max(failures, most)})" if len(launches) > 1 else ""
        # Serve tells this to its controller's log only; say it where the operator looks.
        logger.error("%s does not start%s: %s", self._model_id, which, exc)
        then = after_failure(FailedStart(link, fault, failures, self._stained), len(launches), most)
        if then.reject and bundle is not None:
            await self._reject(bundle, exc)
        return then.link

    async def _reject(self, bundle: BundleSource, exc: Exception) -> None:
        if self._bundles is None or bundle.alias is None:
            return
        if await self._bundles.has_worked(bundle):
            # One node with another driver, or a GPU that computes wrongly, is no reason to take it from all others.
            logger.error("%s: bundle %s is not rejected, as it works in other replicas.", self._model_id, bundle)
            return
        await self._bundles.reject(bundle, f"{self._model_id} did not start from it: {exc}")


def _fingerprint(launch: EngineLaunch) -> str | None:
    return None if launch.certified is None else launch.certified.fingerprint


def fault_of(exc: Exception) -> Fault:
    """Tell whose fault a failed start was."""
    match exc:
        case ConfigError():
            return Fault.OPERATOR
        case BundleCorrupt() | GoldenMismatch():
            return Fault.BUNDLE
        case BundleMismatch():
            return Fault.NODE
        case StoreUnavailable():
            return Fault.SURROUNDINGS
    return Fault.ENGINE


def describe(launch: EngineLaunch) -> str:
    """Return a launch for people: its bundle, or its engine."""
    bundle = launch.certified
    return f"engine {launch.engine.kind}" if bundle is None else f"bundle {bundle.name} {bundle.fingerprint[:12]}"
