"""From a build file to a rolling update: a bundle is built, served by alias, replaced under load, and rolled back."""

import json
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from serve.artifacts.manifest import GOLDEN, Manifest
from tests.integration.bundle_versions import ALIAS, NAME, BundleVersions, babble, other_settings, own_file
from tests.integration.serving import Serving

BIN = Path(sys.executable).parent
DEPLOY_LIMIT_S = 200.0
CLIENTS = 2
PAUSE_S = 0.05  # of a client; the cores are needed for new replicas, too


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> BundleVersions:
    return BundleVersions(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="module")
def first(versions: BundleVersions) -> Manifest:
    return versions.build()


@pytest.fixture(scope="module")
def serving(versions: BundleVersions, first: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    running = Serving(
        {
            "models": [
                {
                    "id": "m",
                    "bundle": versions.reference,
                    "engine": {"kind": "transformers", "num_threads": 1},
                    "resources": {"num_cpus": 0.05},
                    # As on a cluster without room for another replica: the old one stops before the new one starts.
                    "limits": {"health_check_period_s": 1, "surge_percent": 0},
                }
            ],
            "gateway": {"num_cpus": 0.05},
        },
        tmp_path_factory.mktemp("served"),
        environ={"RAYTRT_BUNDLE_CACHE": str(tmp_path_factory.mktemp("cache"))},
    )
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.end()


@dataclass
class Answers:
    """What clients were told.

    Attributes:
        texts: Of good answers.
        bundles: That gave them, as their headers say, oldest first.
        notes: What these said of a stand-in.
        failures: Of requests that were not answered.
    """

    texts: set[str] = field(default_factory=set)
    bundles: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def ask(serving: Serving, into: Answers) -> None:
    body = {"model": "m", "prompt": "How do I serve on 8 GPUs?", "max_tokens": 24, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{serving.url}/v1/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            into.texts.add(json.load(response)["choices"][0]["text"])
            into.bundles.append(response.headers["x-raytrt-bundle"])
            into.notes.append(response.headers.get("x-raytrt-fallback", ""))
    except urllib.error.HTTPError as exc:
        with exc:
            into.failures.append(f"{exc.code}: {exc.read().decode()}")
    except OSError as exc:
        into.failures.append(repr(exc))


@contextmanager
def load(serving: Serving) -> Iterator[Answers]:
    """Clients that ask again and again, until the block ends."""
    answers, stop = Answers(), threading.Event()

    def keep_asking() -> None:
        while not stop.wait(PAUSE_S):
            ask(serving, answers)

    clients = [threading.Thread(target=keep_asking) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        yield answers
    finally:
        stop.set()
        for client in clients:
            client.join()


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait for what other processes do; nothing announces it here."""
    deadline_s = time.monotonic() + DEPLOY_LIMIT_S
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.2)


def deploy(serving: Serving, *options: str) -> tuple[int, dict[str, Any], str]:
    """`raytrt deploy`; returns the status, the outcome, and what was told meanwhile."""
    found = re.search(r"http://[\w.]+:\d+", serving.log())
    assert found, serving.log()
    command = [str(BIN / "raytrt"), "deploy", str(serving.config_path), "--address", found[0], "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEPLOY_LIMIT_S)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


def served(serving: Serving) -> str:
    """Return the bundle of the only model, as /v1/models has it."""
    bundle: str = serving.get("/v1/models/m")[1]["bundle"]
    return bundle


def test_a_build_that_passes_its_gate_is_published_and_promoted(versions: BundleVersions, first: Manifest) -> None:
    assert first.quantization.recipe == "int8_weight_only"
    assert first.certificates.greedy_agreement is not None
    assert versions.promoted == first.fingerprint


def test_what_was_built_is_what_serves(serving: Serving, first: Manifest) -> None:
    answers = Answers()
    ask(serving, answers)
    assert (answers.failures, answers.bundles) == ([], [first.fingerprint])
    assert served(serving) == first.fingerprint
    assert "repeats its golden samples" in serving.log()
    assert f"raytrt: m: bundle {NAME}@{ALIAS} {first.fingerprint[:12]}: transformers-checkpoint" in serving.log()


def test_a_moved_alias_rolls_over_without_a_lost_request_though_the_only_replica_stops_first(
    serving: Serving, versions: BundleVersions, first: Manifest
) -> None:
    second = versions.derive(first, "second", other_settings)
    versions.promote(second)
    with load(serving) as answers:
        status, outcome, told = deploy(serving)
    assert (status, outcome["state"]) == (0, "deployed"), told
    assert outcome["bundles"][0]["fingerprint"] == second.fingerprint
    assert outcome["bundles"][0]["before"] == first.fingerprint
    assert answers.failures == []
    assert set(answers.bundles) == {first.fingerprint, second.fingerprint}
    assert len(answers.texts) == 1
    assert served(serving) == answers.bundles[-1] == second.fingerprint


def test_an_alias_that_stayed_changes_nothing(serving: Serving) -> None:
    before = serving.replica_pids("model-m"), serving.replica_pids("gateway")
    status, outcome, told = deploy(serving)
    assert (status, outcome["state"]) == (0, "unchanged"), told
    assert (serving.replica_pids("model-m"), serving.replica_pids("gateway")) == before


def test_a_rollout_to_a_damaged_bundle_is_taken_back(
    serving: Serving, versions: BundleVersions, first: Manifest
) -> None:
    del serving.document["applications"][0]["args"]["models"][0]["limits"]["surge_percent"]
    serving.write_config()
    good = versions.promoted
    bad = versions.derive(first, "damaged", own_file)
    versions.damage(bad, GOLDEN)
    versions.promote(bad)
    with load(serving) as answers:
        status, outcome, told = deploy(serving)
    assert (status, outcome["state"]) == (1, "rolled_back"), told
    assert GOLDEN in outcome["reason"]
    assert "BLAKE3" in outcome["reason"]
    assert versions.promoted == good
    assert versions.store.history(NAME, ALIAS)[-1].rejected == bad.fingerprint
    assert answers.failures == []
    assert set(answers.bundles) == {good}
    assert len(answers.texts) == 1
    assert served(serving) == good
    assert serving.get("/health")[1]["fallbacks"] == {}


def test_replicas_of_a_bundle_that_babbles_serve_the_one_before_and_say_so(
    serving: Serving, versions: BundleVersions, first: Manifest
) -> None:
    good = versions.promoted
    bad = versions.derive(first, "babbles", babble)
    versions.promote(bad)
    with load(serving) as answers:
        status, outcome, told = deploy(serving, "--no-wait")
        assert (status, outcome["state"]) == (0, "submitted"), told
        eventually(lambda: bool(serving.get("/health")[1]["fallbacks"]), "no gateway told of the bundle before")
        before = len(answers.bundles)
        eventually(lambda: len(answers.bundles) > before + CLIENTS, "nothing is served any more")
    assert versions.promoted == good
    move = versions.store.history(NAME, ALIAS)[-1]
    assert move.rejected == bad.fingerprint
    assert "min_golden_agreement" in move.reason
    assert answers.failures == []
    assert set(answers.bundles) == {good}
    assert len(answers.texts) == 1
    assert served(serving) == bad.fingerprint  # what is configured; what answers is in the header
    assert good in answers.notes[-1]
    assert good in serving.get("/health")[1]["fallbacks"]["m"]
    assert 'raytrt_fallback_active{model="m"} 1.0' in serving.get("/metrics")[1]
