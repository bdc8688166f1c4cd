import re
from typing import Any

import pytest
from pydantic import ValidationError

from serve.core.strict_model import describe_mistakes
from serve.engines.trtllm.settings import TrtllmSettings


def mistakes(document: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as caught:
        TrtllmSettings.model_validate(document)
    return describe_mistakes(caught.value, "engine")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"backend": "tensorrt", "kv_cache": {"dtype": "fp8"}}, "kv_cache.dtype: the tensorrt backend does not have"),
        ({"backend": "tensorrt", "guided_decoding": "llguidance"}, "guided_decoding: .*use xgrammar"),
        (
            {"backend": "tensorrt", "speculation": {"kind": "eagle3", "model": "/head"}},
            r"speculation: .*\(kind: eagle3\); use kind eagle, or backend: pytorch",
        ),
        (
            {"backend": "pytorch", "speculation": {"kind": "eagle", "model": "/head"}},
            r"speculation: .*\(kind: eagle\); use kind eagle3",
        ),
        ({"backend": "tensorrt", "orchestrator": "ray"}, "orchestrator 'ray' runs the PyTorch backend only"),
        ({"backend": "pytorch", "quantization": {"algorithm": "FP8"}}, "quantization: .*ModelOpt"),
        ({"backend": "pytorch", "build": {"fast": True}}, "build: .*builds no engine"),
        ({"orchestrator": "ray", "postprocess_workers": 2}, "postprocess_workers=2 does not work with orch"),
        (
            {"cuda_graphs": {"batch_sizes": [1, 2, 8], "max_batch_size": 4}},
            r"max_batch_size=4 is not the largest of batch_sizes=\[1, 2, 8\]; remove one",
        ),
        ({"cuda_graphs": {"enabled": False, "batch_sizes": [1]}}, "enabled=False records nothing"),
        ({"max_batch_size": 16, "cuda_graphs": {"max_batch_size": 32}}, "record batches of 32, but max_batch_size=16"),
        ({"max_batch_size": 64, "max_num_tokens": 32}, "max_num_tokens=32 is less than max_batch_size=64"),
        ({"kv_cache": {"disk_bytes": 1}}, "disk_bytes=1 and disk_directory=None go together"),
        ({"kv_cache": {"block_reuse": False, "event_buffer": 9}}, "event_buffer=9 needs block_reuse: true"),
        ({"kv_cache": {"min_tokens": 9, "max_tokens": 8}}, "min_tokens=9 exceeds max_tokens=8"),
        ({"attention_dp": {"balance": True}}, "balance need attention_dp.enabled: true"),
        ({"speculation": {"kind": "medusa"}}, "speculation"),
        ({"speculation": {"kind": "eagle3"}}, "speculation.eagle3.model: Field required"),
        ({"quantization": {}}, "give algorithm, kv_cache_algorithm or both"),
        ({"lora": {}}, "lora.target_modules"),
        ({"environment": {"RAY_ADDRESS": "x"}}, "RAY_ADDRESS belong to Ray"),
        ({"environment": {"TLLM_DISABLE_MPI": "1"}}, "TLLM_DISABLE_MPI belong to Ray and to the orchestrator"),
        ({"max_batchsize": 8}, "engine.max_batchsize: there is no such setting"),
        ({"max_beam_width": 2}, "engine.max_beam_width: there is no such setting"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_when_the_config_is_read(document: dict[str, Any], message: str) -> None:
    text = mistakes(document)
    assert re.search(message, text), text


def test_every_setting_says_what_it_is() -> None:
    schema = TrtllmSettings.model_json_schema()
    sections = {"TrtllmSettings": schema, **schema["$defs"]}
    bare = [
        f"{name}.{key}"
        for name, section in sections.items()
        for key, value in section.get("properties", {}).items()
        if key != "kind" and "$ref" not in value and not value.get("description")
    ]
    assert bare == []


def test_the_shortest_configuration_is_enough() -> None:
    assert TrtllmSettings.model_validate({"kind": "trtllm"}) == TrtllmSettings()


def test_every_checkpoint_that_ranks_read_is_known() -> None:
    settings = TrtllmSettings.model_validate(
        {
            "speculation": {"kind": "eagle3", "model": "/head"},
            "lora": {"target_modules": ["attn_q"], "preload": ["/adapters/a"]},
        }
    )
    assert settings.further_checkpoints == ("/head", "/adapters/a")
    assert TrtllmSettings.model_validate({"speculation": {"kind": "ngram"}}).further_checkpoints == ()
