"""What replicas of a model may try, and whether all of it fits into what they reserve."""

from pathlib import Path
from typing import Any

import pytest

from serve.artifacts.store import open_store
from serve.bundle_models import resolve_model
from serve.config import BUILTIN_MODELS, parse_app_config
from serve.errors import ConfigError
from serve.launch_chains import make_chain
from serve.workers.launch import LaunchChain
from tests.unit.serving.bundles import Bundles

QUANTIZED: dict[str, Any] = {"kind": "trtllm-checkpoint", "quantization": {"recipe": "fp8"}}


@pytest.fixture
def bundles(tmp_path: Path) -> Bundles:
    return Bundles(tmp_path)


def chain(**section: Any) -> LaunchChain:
    model = parse_app_config({"models": [{"id": "m", **section}]}).models[0]
    return make_chain(resolve_model(model, open_store))


def fingerprints(of: LaunchChain) -> list[str | None]:
    bundles = [launch.certified for launch in of.launches]
    return [None if bundle is None else bundle.fingerprint for bundle in bundles]


def test_a_checkpoint_is_all_there_is() -> None:
    found = chain()
    assert [launch.model_dir for launch in found.launches] == [str(BUILTIN_MODELS / "quickstart")]
    assert found.launches[0].bundle is None


def test_the_bundle_before_comes_next_and_the_fallback_last(bundles: Bundles) -> None:
    old, new = bundles.publish("v1", **QUANTIZED), bundles.publish("v2", **QUANTIZED)
    found = chain(bundle=bundles.reference, fallback="transformers")
    assert fingerprints(found) == [new.fingerprint, old.fingerprint, None]
    assert [launch.engine.kind for launch in found.launches] == ["trtllm", "trtllm", "transformers"]
    fallback = found.launches[-1]
    assert (fallback.bundle, fallback.model_dir) == (None, str(BUILTIN_MODELS / "quickstart"))
    assert not any(launch.stains for launch in found.launches)  # so that the next can follow in the same replica
    assert found.max_failures == 2


def test_a_fallback_may_borrow_the_files_of_a_bundle_that_it_can_load(bundles: Bundles) -> None:
    manifest = bundles.publish("v1", kind="trtllm-checkpoint")
    fallback = chain(bundle=bundles.reference, fallback="transformers").launches[-1]
    assert fallback.bundle is not None
    assert fallback.bundle.fingerprint == manifest.fingerprint
    assert fallback.certified is None


def test_what_reserves_something_else_cannot_take_over(bundles: Bundles, caplog: pytest.LogCaptureFixture) -> None:
    bundles.publish("v1", parallel={"tensor": 2}, **QUANTIZED)
    new = bundles.publish("v2", **QUANTIZED)
    assert fingerprints(chain(bundle=bundles.reference)) == [new.fingerprint]
    assert "cannot take over in replicas of" in caplog.text
    assert "other resources" in caplog.text


def test_a_missing_fallback_is_a_mistake_at_once(bundles: Bundles) -> None:
    origin = {"source": "org/model", "digest": "0" * 64, "architecture": "LlamaForCausalLM"}
    bundles.publish("v1", model=origin, **QUANTIZED)
    with pytest.raises(ConfigError, match="set fallback_model"):
        chain(bundle=bundles.reference, fallback="transformers")


def test_an_engine_in_the_replicas_process_stains_it(bundles: Bundles) -> None:
    bundles.publish("v1")
    assert chain(bundle=bundles.reference).launches[0].stains
    assert not chain(bundle=bundles.reference, parallel={"tensor": 2}).launches[0].stains
