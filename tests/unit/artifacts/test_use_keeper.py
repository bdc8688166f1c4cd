"""Leases of bundles that gateways and replicas use."""

import asyncio
import logging
import time
from pathlib import Path

import pytest

from serve.artifacts.bundle_source import BundleSource
from serve.artifacts.port import ArtifactStore
from serve.artifacts.store import open_store
from serve.artifacts.use_keeper import UseKeeper
from tests.unit.serving.bundles import ALIAS, NAME, Bundles


class Opened:
    """Opens stores, and remembers how often."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, url: str) -> ArtifactStore:
        self.count += 1
        return open_store(url)

    async def until(self, count: int) -> None:
        deadline_s = time.monotonic() + 20
        while self.count < count:  # counted in another thread
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.001)


def source(bundles: Bundles, label: str) -> BundleSource:
    return BundleSource(bundles.store.url, NAME, ALIAS, bundles.publish(label, promote=False))


async def test_a_bundle_in_use_is_not_collected_until_the_lease_is_over(tmp_path: Path) -> None:
    bundles, opened = Bundles(tmp_path), Opened()
    used, unused = source(bundles, "v1"), source(bundles, "v2")
    keeper = UseKeeper(opened, "gateway 1", lease_s=0.04)
    keeper.start([used, used])
    await opened.until(3)  # it is renewed again and again
    keeper.stop()
    keeper.stop()
    collected = bundles.store.collect(keep_versions=0, grace_s=0)
    assert collected.bundles == (unused.fingerprint,)


async def test_a_store_that_cannot_be_told_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundles, opened = Bundles(tmp_path), Opened()
    gone = source(bundles, "v1")
    bundles.store.collect(keep_versions=0, grace_s=0)
    keeper = UseKeeper(opened, "gateway 1", lease_s=0.04)
    with caplog.at_level(logging.WARNING):
        keeper.start([gone])
        await opened.until(3)
    keeper.stop()
    assert caplog.text.count("could not be told that gateway 1 uses a bundle") == 1


async def test_nothing_is_asked_of_a_store_without_bundles() -> None:
    keeper = UseKeeper(Opened(), "gateway 1", lease_s=0.04)
    keeper.start([])
    keeper.stop()
