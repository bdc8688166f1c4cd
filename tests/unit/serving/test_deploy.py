"""`raytrt deploy`, against a dashboard whose Serve does what the test says, and a real store."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.artifacts.manifest import Manifest
from serve.artifacts.store import open_store
from serve.cli import main
from serve.config_file import ConfigFile, read_config_file
from serve.dashboard import Dashboard, DashboardError
from serve.deploy import Deploy, Outcome
from serve.errors import ConfigError
from serve.pins import describe_bundle, find_pins, pin_document
from tests.integration.counting_server import serve_counted
from tests.unit.serving.bundles import ALIAS, NAME, Bundles
from tests.unit.serving.fake_serve import FakeServe, failing, running, serving, state


@pytest.fixture
def bundles(tmp_path: Path) -> Bundles:
    return Bundles(tmp_path)


@pytest.fixture
def fake() -> Iterator[FakeServe]:
    with serving(FakeServe()) as fake:
        yield fake


def config_file(bundles: Bundles, **model: Any) -> ConfigFile:
    section = {"id": "m", "bundle": bundles.reference, "engine": {"kind": "transformers", "max_batch_size": 8}, **model}
    document = {
        "http_options": {"host": "127.0.0.1", "port": 9},  # where nothing answers
        "applications": [
            {"name": "llm", "import_path": "serve.app:build_app", "route_prefix": "/", "args": {"models": [section]}}
        ],
    }
    path = bundles.path.parent / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return read_config_file(path)


class Deployer:
    """Deploys, with a clock that moves only while somebody sleeps."""

    def __init__(self, fake: FakeServe) -> None:
        self.told: list[str] = []
        self._now_s = 0.0
        self._deploy = Deploy(Dashboard(fake.url, {}), open_store, self.told.append, lambda: self._now_s, self._sleep)

    def _sleep(self, seconds: float) -> None:
        self._now_s += seconds

    def run(self, config: ConfigFile, *, wait: bool = True, timeout_s: float = 60, **options: Any) -> Outcome:
        return self._deploy.run(config, wait=wait, timeout_s=timeout_s, **options)


def fingerprint_of(put: dict[str, Any]) -> str:
    fingerprint: str = put["applications"][0]["args"]["models"][0]["bundle_fingerprint"]
    return fingerprint


def test_aliases_are_pinned_and_everything_else_stays(bundles: Bundles, tmp_path: Path, monkeypatch: Any) -> None:
    manifest = bundles.publish("v1")
    monkeypatch.chdir(tmp_path)
    config = config_file(bundles, bundle=f"./store/{NAME}@{ALIAS}")
    pinned = pin_document(config.document, find_pins(config.applications, open_store))
    before, after = (document["applications"][0]["args"]["models"][0] for document in (config.document, pinned))
    assert after == before | {"bundle": bundles.reference, "bundle_fingerprint": manifest.fingerprint}
    assert "bundle_fingerprint" not in before


def test_a_moved_alias_is_another_text_and_one_that_stayed_the_same(bundles: Bundles, fake: FakeServe) -> None:
    first = bundles.publish("v1")
    fake.reactions = [running, running, running]
    config, deployer = config_file(bundles), Deployer(fake)
    assert deployer.run(config).state == "deployed"
    assert deployer.run(config).state == "unchanged"
    second = bundles.publish("v2")
    outcome = deployer.run(config)
    assert (outcome.state, outcome.before) == ("deployed", {("llm", "m"): first.fingerprint})
    assert [fingerprint_of(put) for put in fake.puts] == [first.fingerprint] * 2 + [second.fingerprint]
    assert fake.puts[0] == fake.puts[1]


def test_replicas_that_serve_something_else_are_told(bundles: Bundles, fake: FakeServe, tmp_path: Path) -> None:
    bundles.publish("v1")
    fake.reactions = [running]
    gateway = tmp_path / "gateway"
    gateway.mkdir()
    (gateway / "health").write_text('{"status": "ok", "fallbacks": {"m": "transformers 5 with bundle tiny"}}')
    deployer = Deployer(fake)
    with serve_counted(gateway) as server:
        config = replace(config_file(bundles), url=server.url)
        outcome = deployer.run(config)
    assert outcome.to_json()["stand_ins"] == {"m": "transformers 5 with bundle tiny"}
    assert "m: some replicas are served by transformers 5 with bundle tiny" in deployer.told[-1]


def test_a_rollout_that_fails_is_taken_back(bundles: Bundles, fake: FakeServe) -> None:
    first = bundles.publish("v1")
    fake.reactions = [running, failing, running]
    config, deployer = config_file(bundles), Deployer(fake)
    deployer.run(config)
    bundles.publish("v2")
    outcome = deployer.run(config)
    assert (outcome.state, outcome.good) == ("rolled_back", False)
    assert outcome.reason == "llm: ValueError: no such thing"
    assert fingerprint_of(fake.puts[-1]) == first.fingerprint
    assert fake.puts[-1] == fake.puts[0]
    assert "going back to what was deployed before" in deployer.told


def test_a_bundle_that_replicas_rejected_is_a_failure_at_once(bundles: Bundles, fake: FakeServe) -> None:
    first = bundles.publish("v1")
    config, deployer = config_file(bundles), Deployer(fake)

    def reject(configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        bundles.store.roll_back(NAME, ALIAS, reason="it babbles", rejected=second.fingerprint)
        return [state("DEPLOYING", configs)]

    fake.reactions = [running, reject, running]
    deployer.run(config)
    second = bundles.publish("v2")
    outcome = deployer.run(config)
    assert (outcome.state, outcome.reason) == (
        "rolled_back",
        f"bundle {NAME}@{ALIAS} {second.fingerprint[:12]} was rejected: it babbles",
    )
    assert fingerprint_of(fake.puts[-1]) == first.fingerprint


def test_a_configuration_with_a_rejected_bundle_is_not_gone_back_to(bundles: Bundles, fake: FakeServe) -> None:
    good, bad = bundles.publish("v1"), bundles.publish("v2")
    fake.reactions = [running, failing, running]
    config, deployer = config_file(bundles), Deployer(fake)
    deployer.run(config, wait=False)
    bundles.store.roll_back(NAME, ALIAS, reason="it babbles", rejected=bad.fingerprint)
    bundles.publish("v3", promote=False)
    assert deployer.run(config_file(bundles, max_start_failures=3)).state == "rolled_back"
    assert fingerprint_of(fake.puts[-1]) == good.fingerprint


def test_there_may_be_nothing_to_go_back_to(bundles: Bundles, fake: FakeServe) -> None:
    bundles.publish("v1")
    fake.reactions = [failing, failing]
    config, deployer = config_file(bundles), Deployer(fake)
    assert deployer.run(config).state == "failed"
    assert deployer.run(config).state == "failed"  # what failed is no configuration that worked
    assert len(fake.puts) == 2


def test_a_rollout_that_does_not_end_is_taken_back(bundles: Bundles, fake: FakeServe) -> None:
    bundles.publish("v1")
    fake.reactions = [running, lambda configs: [state("DEPLOYING", configs)], running]
    config, deployer = config_file(bundles), Deployer(fake)
    deployer.run(config)
    bundles.publish("v2")
    outcome = deployer.run(config, timeout_s=30)
    assert (outcome.state, outcome.reason[:23]) == ("rolled_back", "not done after 30 s: ll")


def test_a_dashboard_that_is_away_for_a_while_is_waited_for(bundles: Bundles, fake: FakeServe) -> None:
    bundles.publish("v1")

    def go_away(configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        fake.down = 3
        return running(configs)

    fake.reactions = [go_away]
    assert Deployer(fake).run(config_file(bundles)).state == "deployed"


def test_another_tokenizer_is_refused_before_anything_is_deployed(bundles: Bundles, fake: FakeServe) -> None:
    bundles.publish("v1")
    fake.reactions = [running, running]
    config, deployer = config_file(bundles), Deployer(fake)
    deployer.run(config)
    bundles.publish("v2", tokenizer='{"other": 1}')
    with pytest.raises(ConfigError, match=r"models\[m\]\.bundle: .*another tokenizer.*--change-tokenizer"):
        deployer.run(config)
    assert len(fake.puts) == 1
    assert deployer.run(config, change_tokenizer=True).state == "deployed"


# The command


def test_the_command_prints_the_outcome_for_machines(
    bundles: Bundles, fake: FakeServe, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = bundles.publish("v1")
    config_file(bundles)
    fake.reactions = [running, failing]
    command = ["deploy", str(bundles.path.parent / "config.yaml"), "--address", fake.url, "--json"]
    assert main([*command, "--no-wait"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["state"] == "submitted"
    assert outcome["bundles"][0] == {
        "application": "llm",
        "model": "m",
        "bundle": bundles.reference,
        "fingerprint": manifest.fingerprint,
        "before": None,
    }


def test_mistakes_of_the_user_end_with_status_2(
    bundles: Bundles, fake: FakeServe, capsys: pytest.CaptureFixture[str]
) -> None:
    config_file(bundles)
    path = str(bundles.path.parent / "config.yaml")
    assert main(["deploy", path, "--address", fake.url]) == 2
    assert "models[m].bundle" in capsys.readouterr().err
    bundles.publish("v1")
    assert main(["deploy", path, "--address", "127.0.0.1:8265"]) == 2
    assert "is no URL of a dashboard" in capsys.readouterr().err
    assert main(["deploy", path, "--address", "http://127.0.0.1:9"]) == 2
    assert "no dashboard answers at http://127.0.0.1:9" in capsys.readouterr().err


def test_check_tells_what_an_alias_means(bundles: Bundles, capsys: pytest.CaptureFixture[str]) -> None:
    certificates = {"accuracy_drop": 0.002, "greedy_agreement": 0.987, "output_tokens_per_s": 1234.5}
    manifest = bundles.publish("v1", certificates=certificates, quantization={"recipe": "int8_weight_only"})
    config_file(bundles)
    assert main(["check", str(bundles.path.parent / "config.yaml")]) == 0
    told = capsys.readouterr().out
    assert f"bundle {NAME}@{ALIAS} {manifest.fingerprint[:12]}: transformers-checkpoint, int8_weight_only" in told
    assert "accuracy drop 0.20%, greedy agreement 98.7%, 1234 tokens/s" in told


# The dashboard


def test_a_token_is_shown_only_where_it_is_asked_for(fake: FakeServe, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret\n")
    fake.token = "secret"
    assert Dashboard(fake.url, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}).details() == {"applications": {}}
    assert Dashboard(fake.url, {"RAY_AUTH_TOKEN": "secret"}).details() == {"applications": {}}
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN"):
        Dashboard(fake.url, {"RAY_AUTH_TOKEN": "wrong"}).details()


def test_what_a_dashboard_refuses_is_told(fake: FakeServe) -> None:
    dashboard = Dashboard(fake.url, {})
    with pytest.raises(ConfigError, match=r"refuses \(400\): a bad config"):
        dashboard.deploy({"refuse": True})
    fake.down = 1
    with pytest.raises(DashboardError, match="answers 503: not now"):
        dashboard.details()


def test_a_bundle_is_described_by_its_certificates(bundles: Bundles) -> None:
    manifest: Manifest = bundles.publish("v1")
    pin = find_pins(config_file(bundles).applications, open_store)[0]
    assert describe_bundle(pin.bundle).endswith("no certificates")
    assert str(pin).startswith(f"m: bundle {NAME}@{ALIAS} {manifest.fingerprint[:12]}")
