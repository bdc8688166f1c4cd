"""Which recipe makes which kind of bundle, and what a build file is told that asks for another."""

import pytest

from builders.quantize.recipes import export_format, min_compute_capability, presets, recipe_mistakes
from builders.settings.quantize import QuantizeSettings
from builders.spec import parse_spec
from serve.artifacts.manifest import BundleKind
from serve.errors import ConfigError

TRANSFORMERS, CHECKPOINT, ENGINE = (
    BundleKind.TRANSFORMERS_CHECKPOINT,
    BundleKind.TRTLLM_CHECKPOINT,
    BundleKind.TENSORRT_ENGINE,
)


@pytest.mark.parametrize(
    ("recipe", "kinds"),
    [
        ("none", {TRANSFORMERS, CHECKPOINT, ENGINE}),
        ("int8_weight_only", {TRANSFORMERS}),
        ("fp8", {CHECKPOINT, ENGINE}),
        ("int4_awq", {CHECKPOINT, ENGINE}),
        ("nvfp4", {CHECKPOINT, ENGINE}),
        ("int8_smoothquant", {ENGINE}),
    ],
)
def test_each_recipe_is_refused_for_the_kinds_that_cannot_load_it(recipe: str, kinds: set[BundleKind]) -> None:
    for kind in BundleKind:
        mistakes = recipe_mistakes(QuantizeSettings(recipe=recipe), kind)  # type: ignore[arg-type]
        assert bool(mistakes) == (kind not in kinds)
        assert all(recipe in mistake and "use " in mistake for mistake in mistakes)


@pytest.mark.parametrize(
    ("settings", "kind", "says"),
    [
        ({"recipe": "none", "kv_cache": "fp8"}, CHECKPOINT, "engine.kv_cache.dtype"),
        ({"recipe": "int8_weight_only", "kv_cache": "fp8"}, TRANSFORMERS, "use auto"),
        ({"recipe": "fp8", "kv_cache": "nvfp4"}, ENGINE, "use fp8"),
        ({"recipe": "int4_awq", "group_size": 32}, CHECKPOINT, "64 or 128"),
    ],
)
def test_combinations_that_nothing_loads(settings: dict[str, object], kind: BundleKind, says: str) -> None:
    (mistake,) = recipe_mistakes(QuantizeSettings.model_validate(settings), kind)
    assert says in mistake


def test_a_build_file_is_told_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"quantize\.recipe: 'fp8' cannot be loaded from a transformers-checkpoint"):
        parse_spec({"name": "x", "quantize": "fp8"})


def test_the_oldest_gpu_is_that_of_the_pickier_part() -> None:
    assert min_compute_capability(QuantizeSettings(recipe="int4_awq")) == "8.0"
    assert min_compute_capability(QuantizeSettings(recipe="int4_awq", kv_cache="fp8")) == "8.9"
    assert min_compute_capability(QuantizeSettings(recipe="nvfp4", kv_cache="fp8")) == "10.0"
    assert min_compute_capability(QuantizeSettings(recipe="int8_weight_only")) is None


def test_the_tensorrt_backend_has_a_format_of_its_own_for_what_it_cannot_read_otherwise() -> None:
    assert export_format(QuantizeSettings(recipe="int8_smoothquant"), ENGINE) == "tensorrt-llm"
    assert export_format(QuantizeSettings(recipe="int4_awq"), ENGINE) == "tensorrt-llm"
    assert export_format(QuantizeSettings(recipe="fp8"), ENGINE) == "unified"
    assert export_format(QuantizeSettings(recipe="int4_awq"), CHECKPOINT) == "unified"


def test_the_kv_cache_is_a_preset_more() -> None:
    assert presets(QuantizeSettings(recipe="fp8")) == ("FP8_DEFAULT_CFG",)
    assert presets(QuantizeSettings(recipe="fp8", kv_cache="fp8")) == ("FP8_DEFAULT_CFG", "FP8_KV_CFG")
    assert presets(QuantizeSettings(recipe="int8_weight_only")) == ()
