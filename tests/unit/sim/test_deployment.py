"""What is simulated, from a command line or a config file."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.engines.simulated.known_models import MODELS
from serve.engines.simulated.settings import RooflineSettings
from serve.errors import ConfigError
from sim.deployment import Overrides, SimDeployment, make_deployment, read_deployment
from tests.unit.serving.bundles import Bundles

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}


def config(path: Path, *models: dict[str, Any], **app: Any) -> Path:
    path = path / "config.yaml"
    args = {"models": models, **app}
    path.write_text(yaml.safe_dump({"applications": [{"import_path": "serve.app:build_app", "args": args}]}))
    return path


def checkpoint(path: Path, **changes: Any) -> Path:
    (path / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    return path


def latency(deployment: SimDeployment) -> RooflineSettings:
    found = deployment.engine.latency
    assert isinstance(found, RooflineSettings)
    return found


def test_the_command_line_alone_describes_an_engine() -> None:
    made = make_deployment(
        Overrides(model="llama-3.3-70b", gpu="h200", tensor_parallel=4, weights="bf16", tokens_per_block=64)
    )
    assert (made.gpus_per_replica, made.engine.tokens_per_block) == (4, 64)
    assert (latency(made).model, latency(made).gpu, latency(made).weights) == ("llama-3.3-70b", "h200", "bf16")
    assert made.engine.context_tokens == MODELS["llama-3.3-70b"].context_tokens


def test_the_cache_can_be_given_in_blocks_or_as_a_share_of_what_fits() -> None:
    fits = make_deployment(Overrides()).engine.make_limits().total_blocks
    half = make_deployment(Overrides(cache_fraction=0.5)).engine.make_limits().total_blocks
    assert half == int(fits * 0.5)
    assert make_deployment(Overrides(cache_blocks=77)).engine.total_blocks == 77


def test_an_engine_of_a_config_file_is_simulated_as_it_is(tmp_path: Path) -> None:
    path = config(
        tmp_path,
        {
            "id": "m",
            "replicas": 3,
            "engine": {"kind": "simulated", "total_blocks": 100, "max_waiting": 7, "speed": 4.0},
            "routing": {"policy": "least_tokens"},
        },
        gateway={"replicas": 2},
    )
    made = read_deployment(path, None, Overrides())
    assert (made.engine.total_blocks, made.engine.max_waiting, made.replicas, made.gateways) == (100, 7, 3, 2)
    assert made.routing is not None
    assert made.routing.model_dump()["policy"] == "least_tokens"
    assert made.notes == ("speed=4 is taken as 1: virtual time needs no hurry",)
    # The same memory in blocks of another size.
    assert read_deployment(path, None, Overrides(tokens_per_block=64)).engine.total_blocks == 50


def test_a_trtllm_engine_becomes_a_simulated_one_of_its_checkpoints_shape(tmp_path: Path) -> None:
    path = config(
        tmp_path,
        {
            "id": "m",
            "model": str(checkpoint(tmp_path, quantization_config={"quant_algo": "FP8"})),
            "engine": {
                "kind": "trtllm",
                "max_batch_size": 64,
                "kv_cache": {"tokens_per_block": 64, "dtype": "fp8", "memory_fraction": 0.8},
                "scheduler": {"capacity": "max_utilization"},
            },
            "parallel": {"tensor": 2},
            "resources": {"accelerator_type": "H100"},
            "autoscaling": {"min_replicas": 1, "max_replicas": 6},
        },
    )
    made = read_deployment(path, None, Overrides())
    assert latency(made).shape == MODELS["llama-3.1-8b"]
    assert (latency(made).gpu, latency(made).tensor_parallel, latency(made).weights) == ("h100", 2, "fp8")
    assert (latency(made).kv_cache, latency(made).kv_fraction) == ("fp8", 0.8)
    assert (made.engine.tokens_per_block, made.engine.max_batch_size, made.engine.max_waiting) == (64, 64, 256)
    assert made.engine.scheduling == "max_utilization"
    assert (made.gpus_per_replica, made.replicas) == (2, 6)
    assert made.notes == ("autoscaling is not simulated: there are max_replicas=6 replicas all the time",)
    assert latency(read_deployment(path, None, Overrides(gpu="b200", weights="fp4"))).gpu == "b200"


def test_a_transformers_engine_becomes_a_simulated_one(tmp_path: Path) -> None:
    engine = {"kind": "transformers", "kv_cache_tokens": 64_000, "prefix_sharing": False}
    path = config(tmp_path, {"id": "m", "model": str(checkpoint(tmp_path)), "engine": engine})
    made = read_deployment(path, None, Overrides(gpu="l40s"))
    assert (made.engine.total_blocks, made.engine.share_prefixes, made.replicas) == (2000, False, 1)
    assert (latency(made).weights, latency(made).kv_cache) == ("bf16", "bf16")


def test_the_layout_is_simulated_as_it_is_configured(tmp_path: Path) -> None:
    model = {
        "id": "m",
        "model": str(checkpoint(tmp_path)),
        "engine": {"kind": "trtllm", "attention_dp": {"enabled": True}},
        "parallel": {"tensor": 2, "pipeline": 2},
        "resources": {"accelerator_type": "A100"},
    }
    made = read_deployment(config(tmp_path, model), None, Overrides())
    assert (made.gpus_per_replica, latency(made).gpu, made.notes) == (4, "a100-80gb", ())
    assert (latency(made).tensor_parallel, latency(made).pipeline_parallel, latency(made).attention_dp) == (2, 2, True)


def test_a_bundle_is_simulated_with_its_tuned_settings_and_its_quantized_weights(tmp_path: Path) -> None:
    bundles = Bundles(tmp_path)
    bundles.publish(
        "one",
        config=LLAMA,
        kind="trtllm-checkpoint",
        parallel={"tensor": 2},
        quantization={"recipe": "fp8", "algorithm": "FP8", "kv_cache_algorithm": "FP8"},
        runtime={"engine": {"kind": "trtllm", "max_batch_size": 48}},
    )
    model = {"id": "m", "bundle": bundles.reference, "resources": {"accelerator_type": "H100"}}
    made = read_deployment(config(tmp_path, model), None, Overrides())
    assert (latency(made).shape, made.engine.max_batch_size) == (MODELS["llama-3.1-8b"], 48)
    assert (latency(made).tensor_parallel, latency(made).weights, latency(made).kv_cache) == (2, "fp8", "fp8")


def test_a_bundle_whose_weights_are_not_understood_is_refused(tmp_path: Path) -> None:
    bundles = Bundles(tmp_path)
    bundles.publish("one", config=LLAMA, kind="trtllm-checkpoint", quantization={"algorithm": "MIXED_PRECISION"})
    model = {"id": "m", "bundle": bundles.reference, "resources": {"accelerator_type": "H100"}}
    with pytest.raises(ConfigError, match=r"bundle tiny@prod \w+: .*MIXED_PRECISION.*--model"):
        read_deployment(config(tmp_path, model), None, Overrides())


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (Overrides(model="llama-3.3-70b", weights="bf16"), "the weights do not fit on tensor_parallel=1"),
        (Overrides(tokens_per_block=9000), "cannot hold max_batch_size=256 .* raise the first"),
        (Overrides(max_num_tokens=100), "max_num_tokens=100"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: Overrides, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_deployment(overrides)


def test_a_model_of_several_has_to_be_chosen(tmp_path: Path) -> None:
    path = config(tmp_path, {"id": "a", "engine": "simulated"}, {"id": "b", "engine": "simulated"})
    with pytest.raises(ConfigError, match="has the models a, b: choose one by --config-model"):
        read_deployment(path, None, Overrides())
    with pytest.raises(ConfigError, match="--config-model='c' is none of its models: a, b"):
        read_deployment(path, "c", Overrides())
    assert read_deployment(path, "b", Overrides()).replicas == 1


def test_an_unknown_gpu_and_useless_changes_are_refused(tmp_path: Path) -> None:
    path = config(tmp_path, {"id": "m", "model": str(checkpoint(tmp_path))})
    with pytest.raises(ConfigError, match=r"models\[m\].resources.accelerator_type=None is no GPU .* add --gpu with"):
        read_deployment(path, None, Overrides())
    path = config(tmp_path, {"id": "m", "engine": {"kind": "simulated", "latency": {"kind": "fixed"}}})
    with pytest.raises(ConfigError, match="--gpu has no effect on a latency model of fixed rates"):
        read_deployment(path, None, Overrides(gpu="h100"))


def test_a_checkpoint_tells_its_precisions(tmp_path: Path) -> None:
    quantization = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}
    directory = checkpoint(tmp_path, quantization_config=quantization)
    model = {"id": "m", "model": str(directory), "engine": "trtllm", "resources": {"accelerator_type": "B200"}}
    made = read_deployment(config(tmp_path, model), None, Overrides())
    assert (latency(made).weights, latency(made).kv_cache) == ("fp4", "fp8")


def test_a_checkpoint_that_is_not_understood_is_refused_with_a_remedy(tmp_path: Path) -> None:
    path = config(tmp_path, {"id": "m", "model": str(checkpoint(tmp_path, model_type="mamba")), "engine": "trtllm"})
    with pytest.raises(ConfigError, match=r"model_type 'mamba' is none of .*describe the model by --model instead"):
        read_deployment(path, None, Overrides(gpu="h100"))
