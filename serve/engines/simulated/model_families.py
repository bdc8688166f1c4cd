"""Families: what the config.json of each model type does not say, or says by other names than Llama's.

Sources: the models' own code, in the transformers library or beside their checkpoints; a test counts the weights of
each family as that library builds it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Flag = bool | str  # a text is the key in config.json that says so
Windows = Literal["none", "all", "from_layer", "alternate", "pattern", "chunks"]
Experts = Literal["none", "all", "after_dense", "interleaved"]


@dataclass(frozen=True)
class Family:
    """One model type.

    Attributes:
        keys: Its names of Llama's keys.
        defaults: What holds if config.json does not say; Llama's names.
        gated: Whether a feed-forward network has three matrices.
        qkv_bias, output_bias, mlp_bias, head_bias: Where biases are.
        norms: Norms of a layer, each over the hidden size.
        norm_bias: Whether norms have a bias.
        qk_norm: Whether queries and keys have a norm: the same for each head, one for each, or one over all heads.
        qk_norm_if: Whether they do, if that is not certain.
        windows: Which layers have a sliding window, unless `layer_types` says it.
        experts: Which layers have experts.
        expert_bias: Whether experts and router have biases.
        router_bias: Whether a correction is added to the router's scores.
        shared_gate: Whether the shared expert has a gate.
        sinks: Whether each head has an attention sink.
        positions: Rows of learned positions besides `max_position_embeddings`; None: positions are not learned.
        refused: Keys with the only values that are understood.
    """

    keys: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    gated: bool = True
    qkv_bias: Flag = False
    output_bias: Flag = False
    mlp_bias: Flag = False
    head_bias: Flag = False
    norms: int = 2
    norm_bias: bool = False
    qk_norm: Literal["none", "head", "heads", "all"] = "none"
    qk_norm_if: Flag = True
    windows: Windows = "none"
    experts: Experts = "none"
    expert_bias: bool = False
    router_bias: bool = False
    shared_gate: bool = False
    sinks: bool = False
    positions: int | None = None
    refused: Mapping[str, Any] = field(default_factory=dict)


_UNTIED = {"tie_word_embeddings": False}
_LLAMA = Family(defaults=_UNTIED, qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias")
_MISTRAL = Family(defaults=_UNTIED, windows="all")
_QWEN2 = Family(defaults={**_UNTIED, "max_window_layers": 28}, qkv_bias=True, windows="from_layer")
_QWEN3 = Family(
    defaults={**_UNTIED, "head_dim": 128, "max_window_layers": 28},
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    qk_norm="head",
    windows="from_layer",
)
_GEMMA_DEFAULTS = {"head_dim": 256, "vocab_size": 256000, "max_position_embeddings": 8192}
_DEEPSEEK = Family(defaults=_UNTIED, qkv_bias="attention_bias", output_bias="attention_bias", experts="after_dense")
_EVERY_LAYER = {"decoder_sparse_step": 1, "mlp_only_layers": []}
_GPT2_KEYS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
}

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "granite": _LLAMA,
    "smollm3": Family(qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"),
    "seed_oss": Family(
        defaults={**_UNTIED, "attention_bias": True, "head_dim": 128},
        qkv_bias="attention_bias",
        output_bias="attention_out_bias",
        mlp_bias="mlp_bias",
    ),
    "mistral": _MISTRAL,
    "mixtral": Family(defaults=_UNTIED, windows="all", experts="all"),
    "qwen2": _QWEN2,
    "qwen2_vl": _QWEN2,
    "qwen2_vl_text": _QWEN2,
    "qwen2_5_vl": _QWEN2,
    "qwen2_5_vl_text": _QWEN2,
    "qwen2_moe": Family(
        defaults=_UNTIED,
        qkv_bias=True,
        windows="from_layer",
        experts="after_dense",
        shared_gate=True,
        refused=_EVERY_LAYER,
    ),
    "qwen3": _QWEN3,
    "qwen3_vl_text": replace(_QWEN3, windows="none"),
    "qwen3_moe": replace(_QWEN3, experts="after_dense", refused=_EVERY_LAYER),
    "gemma": Family(defaults=_GEMMA_DEFAULTS, qkv_bias="attention_bias", output_bias="attention_bias"),
    "gemma2": Family(
        defaults={**_GEMMA_DEFAULTS, "sliding_window": 4096},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        norms=4,
        windows="alternate",
    ),
    "gemma3_text": Family(
        defaults={
            **_GEMMA_DEFAULTS,
            "vocab_size": 262208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "max_position_embeddings": 131072,
        },
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        norms=4,
        qk_norm="head",
        windows="pattern",
    ),
    "phi": Family(
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        defaults=_UNTIED,
        gated=False,
        head_bias=True,
        norms=1,
        norm_bias=True,
        refused={"qk_layernorm": False},
    ),
    "phi3": Family(defaults=_UNTIED, windows="all"),
    "phimoe": Family(
        defaults=_UNTIED,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        head_bias="lm_head_bias",
        norm_bias=True,
        windows="all",
        experts="all",
    ),
    "deepseek": _DEEPSEEK,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": replace(_DEEPSEEK, router_bias=True),
    "kimi_k2": replace(_DEEPSEEK, router_bias=True),
    "gpt_oss": Family(
        defaults={**_UNTIED, "attention_bias": True, "head_dim": 64, "sliding_window": 128},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        windows="alternate",
        experts="all",
        expert_bias=True,
        sinks=True,
    ),
    "llama4_text": Family(
        defaults={
            **_UNTIED,
            "head_dim": 128,
            "sliding_window": 8192,
            "interleave_moe_layer_step": 1,
            "intermediate_size_mlp": 16384,
        },
        keys={"sliding_window": "attention_chunk_size"},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        windows="chunks",
        experts="interleaved",
    ),
    "glm": Family(defaults={**_UNTIED, "attention_bias": True, "head_dim": 128}, qkv_bias="attention_bias"),
    "glm4": Family(defaults={**_UNTIED, "attention_bias": True, "head_dim": 128}, qkv_bias="attention_bias", norms=4),
    "glm4_moe": Family(
        defaults={**_UNTIED, "head_dim": 128},
        qkv_bias="attention_bias",
        qk_norm="head",
        qk_norm_if="use_qk_norm",
        experts="after_dense",
        router_bias=True,
    ),
    "chatglm": Family(
        defaults={**_UNTIED, "max_position_embeddings": 2048},
        keys={
            "num_hidden_layers": "num_layers",
            "head_dim": "kv_channels",
            "num_key_value_heads": "multi_query_group_num",
            "intermediate_size": "ffn_hidden_size",
            "vocab_size": "padded_vocab_size",
            "max_position_embeddings": "seq_length",
        },
        qkv_bias="add_qkv_bias",
        output_bias="add_bias_linear",
        mlp_bias="add_bias_linear",
        refused={"multi_query_attention": True},
    ),
    "baichuan": Family(defaults=_UNTIED, keys={"max_position_embeddings": "model_max_length"}),
    "internlm2": Family(defaults=_UNTIED, qkv_bias="bias", output_bias="bias"),
    "olmo2": Family(defaults=_UNTIED, qkv_bias="attention_bias", output_bias="attention_bias", qk_norm="all"),
    "olmoe": Family(
        defaults=_UNTIED, qkv_bias="attention_bias", output_bias="attention_bias", qk_norm="all", experts="all"
    ),
    "cohere": Family(
        qkv_bias="attention_bias", output_bias="attention_bias", norms=1, qk_norm="heads", qk_norm_if="use_qk_norm"
    ),
    "cohere2": Family(
        defaults={"sliding_window": 4096, "sliding_window_pattern": 4},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        norms=1,
        windows="pattern",
    ),
    "nemotron": Family(
        defaults=_UNTIED,
        gated=False,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
        norm_bias=True,
    ),
    "starcoder2": Family(
        defaults={"use_bias": True},
        gated=False,
        qkv_bias="use_bias",
        output_bias="use_bias",
        mlp_bias="use_bias",
        norm_bias=True,
        windows="all",
    ),
    "gpt2": Family(
        qkv_bias=True, output_bias=True, mlp_bias=True, keys=_GPT2_KEYS, gated=False, norm_bias=True, positions=0
    ),
    "gptj": Family(
        defaults=_UNTIED, keys=_GPT2_KEYS, gated=False, mlp_bias=True, head_bias=True, norms=1, norm_bias=True
    ),
    "gpt_neox": Family(
        defaults={**_UNTIED, "attention_bias": True},
        gated=False,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias=True,
        norm_bias=True,
    ),
    "opt": Family(
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        defaults={"word_embed_proj_dim": None},
        keys={"intermediate_size": "ffn_dim"},
        gated=False,
        norm_bias=True,
        positions=2,
        refused={"do_layer_norm_before": True, "enable_bias": True, "layer_norm_elementwise_affine": True},
    ),
    "falcon": Family(
        keys={"num_key_value_heads": "num_kv_heads", "intermediate_size": "ffn_hidden_size"},
        gated=False,
        qkv_bias="bias",
        output_bias="bias",
        mlp_bias="bias",
        norm_bias=True,
    ),
}
