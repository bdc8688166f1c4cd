"""What a model's configuration becomes once its bundle is known, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.artifacts.store import open_store
from serve.bundle_config import merge_settings
from serve.bundle_models import ResolvedModel, fallback_checkpoint, resolve_model
from serve.config import BUILTIN_MODELS, ModelConfig, parse_app_config
from serve.engines.transformers.settings import TransformersSettings
from serve.engines.trtllm.settings import TrtllmSettings
from serve.errors import ConfigError
from tests.unit.serving.bundles import ALIAS, NAME, Bundles

COMPILED: dict[str, Any] = {"kind": "tensorrt-engine", "parallel": {"tensor": 2}, "ranks": 2}


@pytest.fixture
def bundles(tmp_path: Path) -> Bundles:
    return Bundles(tmp_path)


def model(bundles: Bundles, **settings: Any) -> ModelConfig:
    return parse_app_config({"models": [{"id": "m", "bundle": bundles.reference, **settings}]}).models[0]


def resolve(bundles: Bundles, **settings: Any) -> ResolvedModel:
    return resolve_model(model(bundles, **settings), open_store)


# The configuration alone


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"bundle": "s3://b/m@prod", "model": "/m"}, "`bundle` and `model` exclude each other"),
        ({"bundle": "s3://b/m@prod", "tokenizer": "/m"}, "`bundle` and `tokenizer` exclude each other"),
        ({"bundle": "prod"}, "'prod' is no reference of a bundle; write store/name@alias"),
        ({"bundle": "s3://b/m@prod", "bundle_fingerprint": "12"}, "bundle_fingerprint"),
        ({"bundle_fingerprint": "0" * 64}, "`bundle_fingerprint` is for models with a `bundle`"),
        ({"fallback_model": "/m"}, "`fallback_model` is for models with a `bundle`"),
        (
            {"bundle": "s3://b/m@prod", "engine": "transformers", "fallback": "transformers", "parallel": {}},
            "the engine is `transformers` already",
        ),
    ],
)
def test_a_bundle_brings_its_own_model(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_app_config({"models": [{"id": "m", **settings}]})


def test_layouts_of_bundles_are_not_judged_by_the_default_engine() -> None:
    section = {
        "id": "m",
        "bundle": "s3://b/m@prod",
        "parallel": {"tensor": 2, "pipeline": 2},
        "fallback": "transformers",
    }
    config = parse_app_config({"models": [section]}).models[0]
    config.check_files()
    assert config.parallel.pipeline == 2


# With the bundle


def test_what_is_said_comes_before_what_was_tuned_and_that_before_defaults(bundles: Bundles) -> None:
    tuned: dict[str, Any] = {"max_batch_size": 32, "max_num_tokens": 256, "context_tokens": 64}
    manifest = bundles.publish("v1", runtime={"engine": tuned})
    found = resolve(bundles, engine={"kind": "transformers", "max_num_tokens": 128})
    assert found.bundle is not None
    assert (found.bundle.fingerprint, found.bundle.alias, found.bundle.name) == (manifest.fingerprint, ALIAS, NAME)
    assert found.config.engine == TransformersSettings(max_batch_size=32, max_num_tokens=128, context_tokens=64)
    assert resolve(bundles).config.engine == TransformersSettings(**tuned)


def test_the_best_load_is_what_replicas_are_scaled_by(bundles: Bundles) -> None:
    bundles.publish("v1", runtime={"replica_requests": 7})
    scaled = resolve(bundles, autoscaling={"max_replicas": 3}).config.autoscaling
    assert scaled is not None
    assert (scaled.target_ongoing_requests, scaled.max_replicas) == (7.0, 3)
    said = resolve(bundles, autoscaling={"target_ongoing_requests": 2}).config.autoscaling
    assert said is not None
    assert said.target_ongoing_requests == 2.0
    assert resolve(bundles).config.autoscaling is None


def test_a_compiled_engine_says_layout_and_backend(bundles: Bundles) -> None:
    bundles.publish("v1", runtime={"engine": {"kv_cache": {"max_tokens": 4096}}}, **COMPILED)
    found = resolve(bundles, engine={"kind": "trtllm", "kv_cache": {"tokens_per_block": 64}}).config
    assert isinstance(found.engine, TrtllmSettings)
    assert (found.parallel.tensor, found.engine.backend) == (2, "tensorrt")
    assert (found.engine.kv_cache.max_tokens, found.engine.kv_cache.tokens_per_block) == (4096, 64)
    assert resolve(bundles, parallel={"tensor": 2, "gpus_per_node": 4}).config.parallel.gpus_per_node == 4


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"parallel": {"tensor": 4}}, r"parallel: tensor=4, .* was compiled for tensor=2, pipeline=1"),
        ({"engine": "transformers"}, r"engine: transformers does not load bundle tiny@prod .* for engine trtllm"),
        ({"engine": "simulated"}, "engine: simulated does not load"),
        ({"engine": {"kind": "trtllm", "backend": "pytorch"}}, "backend: pytorch does not load .* backend tensorrt"),
    ],
)
def test_what_a_compiled_engine_is_not_is_refused_with_both_sides(
    bundles: Bundles, settings: dict[str, Any], complaint: str
) -> None:
    bundles.publish("v1", **COMPILED)
    with pytest.raises(ConfigError, match=rf"^models\[m\].*{complaint}"):
        resolve(bundles, **settings)


def test_tuned_settings_that_do_not_fit_what_is_said_are_named(bundles: Bundles) -> None:
    bundles.publish("v1", runtime={"engine": {"kv_cache_tokens": 4096}})
    with pytest.raises(ConfigError, match=r"models\[m\]\.bundle: with the tuned settings of bundle tiny@prod .*engine"):
        resolve(bundles, engine={"kind": "transformers", "kv_cache_bytes": 4096})
    found = resolve(bundles, engine={"kind": "transformers", "kv_cache_bytes": 4096, "kv_cache_tokens": None})
    assert found.config.engine == TransformersSettings(kv_cache_bytes=4096)


def test_a_checkpoint_may_be_cut_otherwise(bundles: Bundles) -> None:
    bundles.publish("v1", kind="trtllm-checkpoint", parallel={"tensor": 2})
    found = resolve(bundles, parallel={"tensor": 4}).config
    assert isinstance(found.engine, TrtllmSettings)
    assert (found.parallel.tensor, found.engine.backend) == (4, "pytorch")


@pytest.mark.parametrize(
    ("reference", "complaint"),
    [
        ("{path}/tiny@production", r"models\[m\]\.bundle: .*production.*prod"),
        ("{path}/huge@prod", r"models\[m\]\.bundle: .*huge.*tiny"),
        ("{path}/tiny@7", r"models\[m\]\.bundle: .*7.*1"),
        ("{path}x/tiny@prod", r"models\[m\]\.bundle: "),
        ("nosuch://store/tiny@prod", r"models\[m\]\.bundle: .*nosuch"),
    ],
)
def test_what_is_not_there_is_answered_with_what_there_is(bundles: Bundles, reference: str, complaint: str) -> None:
    bundles.publish("v1")
    config = model(bundles).model_copy(update={"bundle": reference.format(path=bundles.path)})
    with pytest.raises(ConfigError, match=f"(?s){complaint}"):
        resolve_model(config, open_store)


# What else could serve


def test_the_bundle_before_stands_by_if_an_alias_was_asked_for(bundles: Bundles) -> None:
    old, new = bundles.publish("v1"), bundles.publish("v2")
    before = resolve(bundles).before
    assert before is not None
    assert before.bundle is not None
    assert before.bundle.fingerprint == old.fingerprint
    for selector in ("2", "latest", f"sha256:{new.fingerprint}"):
        exact = model(bundles).model_copy(update={"bundle": f"{bundles.path}/{NAME}@{selector}"})
        found = resolve_model(exact, open_store)
        assert found.bundle is not None
        assert (found.before, found.bundle.alias, found.bundle.fingerprint) == (None, None, new.fingerprint)


def test_a_fingerprint_holds_the_bundle_wherever_the_alias_moves(bundles: Bundles) -> None:
    first, old, _ = bundles.publish("v0"), bundles.publish("v1"), bundles.publish("v2")
    found = resolve(bundles, bundle_fingerprint=old.fingerprint)
    assert found.bundle is not None
    assert (found.bundle.fingerprint, found.bundle.alias) == (old.fingerprint, ALIAS)
    assert found.before is not None
    assert found.before.bundle is not None
    assert found.before.bundle.fingerprint == first.fingerprint


def test_a_bundle_with_another_tokenizer_cannot_take_over(bundles: Bundles, caplog: pytest.LogCaptureFixture) -> None:
    bundles.publish("v1", tokenizer='{"other": 1}')
    bundles.publish("v2")
    assert resolve(bundles).before is None
    assert "another tokenizer" in caplog.text


# Fallbacks


def test_a_fallback_that_is_not_needed_is_left_out(bundles: Bundles) -> None:
    bundles.publish("v1")
    assert resolve(bundles, fallback="transformers").config.fallback is None


def test_a_build_that_fell_back_is_served_by_its_fallback(bundles: Bundles) -> None:
    replaces = {"created": "2026-01-01T00:00:00Z", "raytrt": "0.1", "replaces": "step compile: no memory"}
    bundles.publish("v1", provenance=replaces)
    found = resolve(bundles, engine="trtllm", fallback={"kind": "transformers", "max_batch_size": 3})
    assert found.config.engine == TransformersSettings(max_batch_size=3)
    assert found.stands_in
    with pytest.raises(ConfigError, match="trtllm does not load"):
        resolve(bundles, engine="trtllm")


def test_a_fallback_finds_a_checkpoint_or_says_what_is_missing(bundles: Bundles, tmp_path: Path) -> None:
    plain = bundles.publish("v1", kind="trtllm-checkpoint")
    found = resolve(bundles, fallback="transformers").config
    assert fallback_checkpoint(found, plain) is None  # its own model will do
    quantized = bundles.publish("v2", kind="trtllm-checkpoint", quantization={"recipe": "fp8"})
    assert fallback_checkpoint(found, quantized) == BUILTIN_MODELS / "quickstart"
    origin = {"source": "org/model", "digest": "0" * 64, "architecture": "LlamaForCausalLM"}
    far = bundles.publish("v3", model=origin, **COMPILED)
    with pytest.raises(ConfigError, match=r"tensorrt-engine, recipe none.*org/model.*set fallback_model"):
        fallback_checkpoint(found, far)
    (tmp_path / "here").mkdir()
    said = found.model_copy(update={"fallback_model": str(tmp_path / "here")})
    with pytest.raises(ConfigError, match=r"fallback_model: .*here has no config\.json"):
        fallback_checkpoint(said, far)
    (tmp_path / "here/config.json").write_text("{}")
    assert fallback_checkpoint(said, far) == tmp_path / "here"


# Merging

leaves = st.none() | st.integers() | st.text(max_size=3)
settings = st.recursive(
    st.dictionaries(st.sampled_from("abc"), leaves, max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), leaves | inner, max_size=3),
    max_leaves=8,
)


@given(settings, settings)
def test_every_setting_that_is_said_stays_as_it_was_said(first: dict[str, Any], then: dict[str, Any]) -> None:
    merged = merge_settings(first, then)
    assert merged.keys() == first.keys() | then.keys()
    assert merge_settings(first, merged) == merged
    assert merge_settings({}, then) == then
    for key, value in first.items():
        assert isinstance(value, dict) or merged[key] == value


def test_a_section_of_another_kind_is_taken_whole() -> None:
    tuned = {"latency": {"kind": "fixed", "decode_step_s": 1}, "size": 3}
    assert merge_settings({"latency": {"kind": "roofline"}}, tuned) == {"latency": {"kind": "roofline"}, "size": 3}
    assert merge_settings({"latency": {"decode_step_s": 2}}, tuned)["latency"] == {"kind": "fixed", "decode_step_s": 2}
