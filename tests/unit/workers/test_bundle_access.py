"""What a starting replica does with a bundle's store and files, on one node."""

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.artifacts.blobs import blob_key
from serve.artifacts.bundle_source import BundleSource
from serve.artifacts.clock import Clock
from serve.artifacts.node_cache import NodeCache
from serve.artifacts.port import ArtifactStore
from serve.artifacts.store import Store, open_objects
from serve.core.parallel import ParallelLayout
from serve.engines.transformers.settings import TransformersSettings
from serve.errors import BundleCorrupt, BundleMismatch, StoreUnavailable
from serve.start_notes import StartNotes
from serve.workers.bundle_access import ReplicaBundles
from serve.workers.bundle_nodes import BundleFetch, LaunchNodes, check_nodes
from serve.workers.download_text import Transfer, download_text, size_text
from serve.workers.group_settings import GroupSettings
from serve.workers.launch import EngineLaunch, plan_launch
from serve.workers.settings import RankResources
from tests.unit.serving.bundles import ALIAS, NAME, Bundles
from tests.unit.serving.fake_values import FakeValues
from tests.unit.workers.fake_bundles import manifest_of, source_of

HERE = LaunchNodes("here", {"here": None})


@pytest.fixture
def bundles(tmp_path: Path) -> Bundles:
    return Bundles(tmp_path)


def access(values: FakeValues, replica: str = "r1", stores: object = None) -> ReplicaBundles:
    notes = StartNotes(values, "llm", "model-m", replica)
    return ReplicaBundles(notes) if stores is None else ReplicaBundles(notes, stores=stores)  # type: ignore[arg-type]


def source(bundles: Bundles, label: str) -> BundleSource:
    return BundleSource(bundles.store.url, NAME, ALIAS, bundles.publish(label))


def launch(bundle: BundleSource, **resources: float) -> EngineLaunch:
    engine = TransformersSettings()
    plan = plan_launch(engine, ParallelLayout(), RankResources(**resources), mpi_works=lambda: True)  # type: ignore[arg-type]
    return EngineLaunch(engine, "", plan, None, GroupSettings(), bundle)


def away(url: str) -> ArtifactStore:
    raise StoreUnavailable(f"{url}: 503")


# Rejections


async def test_a_rejected_bundle_is_moved_away_from_for_everybody(bundles: Bundles) -> None:
    old, new = source(bundles, "v1"), source(bundles, "v2")
    values = FakeValues()
    assert await access(values).rejected(new) == set()
    await access(values).reject(new, "it babbles")
    assert bundles.store.aliases(NAME)[ALIAS].fingerprint == old.fingerprint
    assert bundles.store.history(NAME, ALIAS)[-1].rejected == new.fingerprint
    for other in (access(values, "r2"), access(FakeValues())):  # of this deployment, and of any other
        assert await other.rejected(new) == {new.fingerprint}


async def test_an_alias_without_an_earlier_bundle_stays(bundles: Bundles, caplog: pytest.LogCaptureFixture) -> None:
    only, values = source(bundles, "v1"), FakeValues()
    await access(values).reject(only, "it babbles")
    assert bundles.store.aliases(NAME)[ALIAS].fingerprint == only.fingerprint
    assert "its alias stays" in caplog.text
    assert await access(values, "r2").rejected(only) == {only.fingerprint}


async def test_replicas_know_of_a_rejection_also_where_the_store_cannot_be_told(
    bundles: Bundles, caplog: pytest.LogCaptureFixture
) -> None:
    source(bundles, "v1")
    new, values = source(bundles, "v2"), FakeValues()
    await access(values, stores=away).reject(new, "it babbles")
    assert "could not be moved back" in caplog.text
    assert await access(values, "r2", stores=away).rejected(new) == {new.fingerprint}
    assert await access(values, "r2").rejected(new) == {new.fingerprint}
    assert await access(FakeValues(), stores=away).rejected(new) == set()


async def test_a_bundle_that_was_promoted_again_may_be_tried_again(bundles: Bundles) -> None:
    source(bundles, "v1")
    new, values = source(bundles, "v2"), FakeValues()
    await access(values).reject(new, "no memory")
    later = Store(open_objects(str(bundles.path)), clock=Clock(lambda: time.time() + 60, time.monotonic, time.sleep))
    later.move_alias(NAME, ALIAS, new.fingerprint, reason="the node was full")
    assert await access(values, "r2").rejected(new) == set()


async def test_exactly_this_bundle_is_never_rejected(bundles: Bundles) -> None:
    bundle = BundleSource(bundles.store.url, NAME, None, bundles.publish("v1"))
    assert await access(FakeValues(), stores=away).rejected(bundle) == ()


# Nodes and files


async def test_a_node_is_asked_before_anything_is_downloaded() -> None:
    bundle = source_of("a", requires={"machine": "riscv64", "libraries": {"torch": "<1"}})
    with pytest.raises(BundleMismatch, match=r"node here: bundle tiny@prod aaaaaaaaaaaa .*riscv64.*torch <1"):
        await check_nodes(launch(bundle), bundle, HERE)
    await check_nodes(launch(source_of("a")), source_of("a"), HERE)


async def test_a_bundle_for_gpus_wants_replicas_that_have_some() -> None:
    bundle = source_of("a", requires={"gpus": 1})
    with pytest.raises(BundleMismatch, match=r"computes on 1 GPUs, and its replica reserves none"):
        await check_nodes(launch(bundle), bundle, HERE)
    with pytest.raises(BundleMismatch, match="takes 1 GPUs of this node, and 0 may be used"):
        await check_nodes(launch(bundle, num_gpus=1), bundle, HERE)


async def test_files_are_brought_here_and_checked(bundles: Bundles, tmp_path: Path) -> None:
    bundle, cache = source(bundles, "v1"), NodeCache(tmp_path / "cache")
    fetch = BundleFetch(bundle, HERE, cache)
    directory = await fetch.run()
    assert (directory / "model/config.json").read_text() == '{"label": "v1"}'
    assert "100 %" in await fetch.text(time.monotonic())
    fetch.close()
    other = source(bundles, "v2")
    entry = next(entry for entry in other.manifest.files if entry.path == "model/config.json")
    blob = bundles.path / blob_key(entry.blake3)
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[::-1])
    with pytest.raises(BundleCorrupt, match=r"model/config\.json.*BLAKE3"):
        await BundleFetch(other, HERE, cache).run()


# Words


def test_a_download_is_told_in_words() -> None:
    files = [{"path": "model/a", "size_bytes": 15_200_000_000, "blake3": "0" * 64}]
    bundle = BundleSource("s3://b", "llama", "prod", manifest_of("1", files=files))
    first, second = Transfer(started_s=100.0), Transfer(started_s=100.0)
    first.note(1_000_000_000, 15_200_000_000)  # was here already
    first.note(5_200_000_000, 15_200_000_000)
    text = download_text(bundle, [first], 120.0)
    assert text == "downloading bundle llama@prod 111111111111: 34 % of 15.2 GB, 210 MB/s"
    second.note(0, 15_200_000_000)
    assert download_text(bundle, [first, second], 120.0).endswith("0 % of 15.2 GB, 0 B/s, 2 nodes")
    assert "0 %" in download_text(bundle, [Transfer(120.0)], 120.0)


@given(st.floats(0, 1e18))
def test_sizes_have_three_digits(size_bytes: float) -> None:
    number, unit = size_text(size_bytes).split()
    scale = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert float(number) * scale == pytest.approx(size_bytes, rel=0.006)
    assert float(number) < 1000 or unit == "TB"
