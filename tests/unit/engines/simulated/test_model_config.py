"""Shapes of every family: as many weights as the transformers library makes, and layers with windows where it has them.

The library is asked with small sizes, and makes its models without memory (on the device `meta`).
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, logging

from serve.engines.simulated.model_config import shape_from_config
from serve.engines.simulated.model_families import FAMILIES

SMALL = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 1000, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}
MHA = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
MANY = {**EXPERTS, "num_experts": 6}
ROUTED = {**EXPERTS, "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 2}
LATENT = {
    **ROUTED,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 24,
    "v_head_dim": 20,
    "n_group": 2,
    "topk_group": 1,
}
WINDOW = {"sliding_window": 64}

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 32}),
    ("granite", {}),
    ("smollm3", {}),
    ("seed_oss", {"head_dim": 32}),
    ("mistral", WINDOW),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("qwen2", {}),
    ("qwen2", {**WINDOW, "use_sliding_window": True, "max_window_layers": 4}),
    ("qwen2_moe", {**MANY, "shared_expert_intermediate_size": 80}),
    ("qwen3", {"head_dim": 32}),
    ("qwen3", {"head_dim": 32, **WINDOW, "use_sliding_window": True, "max_window_layers": 2}),
    ("qwen3_moe", {**MANY, "head_dim": 32}),
    ("gemma", {"head_dim": 32}),
    ("gemma2", {"head_dim": 32, **WINDOW}),
    ("gemma3_text", {"head_dim": 32, **WINDOW}),
    ("phi", {}),
    ("phi3", WINDOW),
    ("phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True}),
    ("deepseek_v2", {**LATENT, "q_lora_rank": None, "topk_method": "greedy"}),
    ("deepseek_v3", {**LATENT, "q_lora_rank": 40}),
    ("deepseek_v3", {**LATENT, "q_lora_rank": 40, "attention_bias": True}),
    ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32, **WINDOW}),
    (
        "llama4_text",
        {
            "intermediate_size_mlp": 128,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "num_hidden_layers": 8,
            "interleave_moe_layer_step": 2,
            "head_dim": 32,
            "attention_chunk_size": 64,
        },
    ),
    ("glm", {"head_dim": 16}),
    ("glm4", {"head_dim": 16}),
    ("glm4_moe", {**ROUTED, "use_qk_norm": True, "attention_bias": True, "head_dim": 32}),
    ("olmo2", {}),
    ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    ("cohere", {"use_qk_norm": True}),
    ("cohere2", {"head_dim": 16, **WINDOW}),
    ("nemotron", {}),
    ("starcoder2", {}),
]
OTHER_NAMES: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", GPT2),
    ("gptj", {**GPT2, "rotary_dim": 8}),
    ("gpt_neox", MHA),
    ("opt", {**MHA, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    ("falcon", {**MHA, "ffn_hidden_size": 96}),
    ("falcon", {**MHA, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    ("falcon", {**MHA, "multi_query": False, "parallel_attn": False}),
]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


@pytest.mark.parametrize(
    ("kind", "values"), [*[(kind, {**SMALL, **values}) for kind, values in CASES], *OTHER_NAMES], ids=str
)
def test_a_shape_has_the_weights_that_the_library_makes(kind: str, values: dict[str, Any]) -> None:
    config = CONFIG_MAPPING[kind](**values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    made = sum(parameter.numel() for parameter in model.parameters())
    made += sum(buffer.numel() for name, buffer in model.named_buffers() if "correction_bias" in name)
    written = {**config.to_diff_dict(), "model_type": kind}
    assert shape_from_config(written).parameters == made
    written.pop("layer_types", None)  # older files do not have it
    types = getattr(config, "layer_types", None) or []
    if kind not in ("mistral", "phi3"):  # of these the library has types, and does not look at them
        windowed = [layer_type for layer_type in types if layer_type in ("sliding_attention", "chunked_attention")]
        assert shape_from_config(written).windowed_layers == len(windowed)


def config(kind: str = "llama", **changes: Any) -> dict[str, Any]:
    return {"model_type": kind, **SMALL, **changes}


def test_every_family_is_read() -> None:
    more = {"num_layers": 2, "kv_channels": 16, "multi_query_group_num": 2, "ffn_hidden_size": 96}
    for kind in FAMILIES:
        shape = shape_from_config({**config(kind), **more, **GPT2, "ffn_dim": 96})
        assert shape.hidden == 64, kind


def test_layer_types_say_which_layers_have_a_window() -> None:
    types = ["sliding_attention", "sliding_attention", "full_attention"] * 2 + ["full_attention"]
    assert shape_from_config(config("qwen3", layer_types=types, **WINDOW)).windowed_layers == 4
    assert shape_from_config(config("mistral", sliding_window=4096)).windowed_layers == 0  # longer than the context


def test_a_model_of_text_and_pictures_is_read_by_its_text_part() -> None:
    text = {key: value for key, value in config("gemma3_text", **WINDOW).items() if not key.startswith("num_")}
    shape = shape_from_config({"model_type": "gemma3", "text_config": {**text, "num_hidden_layers": 12}})
    assert (shape.layers, shape.heads, shape.kv_heads, shape.head_dim) == (12, 8, 4, 256)
    assert shape.tied_embeddings
    assert shape.windowed_layers == 10
    outer = {"model_type": "llava", "tie_word_embeddings": False, "text_config": config("gemma")}
    assert not shape_from_config(outer).tied_embeddings


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({}, "model_type None is none of those that are understood: baichuan, chatglm"),
        ({"model_type": "mamba2"}, "model_type 'mamba2' is none of"),
        (config("qwen3_moe", decoder_sparse_step=2), "decoder_sparse_step=2 of qwen3_moe is not understood; only 1 is"),
        (config("llama", layer_types=["linear_attention"]), "layer_types: 'linear_attention' is not understood"),
        (config("opt", ffn_dim=9, word_embed_proj_dim=32), "word_embed_proj_dim=32 other than hidden_size"),
        (config("phi", qk_layernorm=True), "qk_layernorm=True of phi is not understood"),
        ({"model_type": "llama"}, "layers"),
        (config("llama", hidden_size=None), "hidden"),
        (config("llama", num_attention_heads="many"), "heads"),
        (config("mixtral", num_local_experts=8), "experts_per_token"),
        (config("mixtral", num_local_experts=2, num_experts_per_tok=4), "experts_per_token=4 exceeds 2"),
    ],
)
def test_what_is_not_understood_is_refused(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        shape_from_config(given)
