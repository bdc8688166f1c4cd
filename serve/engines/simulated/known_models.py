"""MODELS: shapes of well-known models, by the names that people use. Sources: their config.json on Hugging Face."""

from typing import Any

from serve.engines.simulated.model_config import shape_from_config
from serve.engines.simulated.model_shape import ModelShape


def _config(
    kind: str, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int, context: int,
    **more: Any,
) -> dict[str, Any]:  # fmt: skip
    return {
        "model_type": kind,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        **more,
    }


def _llama3(layers: int, hidden: int, intermediate: int, heads: int, **more: Any) -> dict[str, Any]:
    return _config("llama", layers, hidden, intermediate, heads, 8, 128256, 131072, **more)


def _qwen25(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    tied = vocab == 151936
    return _config(
        "qwen2", layers, hidden, intermediate, heads, kv_heads, vocab, 32768, tie_word_embeddings=tied
    )  # fmt: skip


def _qwen3(layers: int, hidden: int, intermediate: int, heads: int, tied: bool) -> dict[str, Any]:
    return _config("qwen3", layers, hidden, intermediate, heads, 8, 151936, 40960, tie_word_embeddings=tied)


def _qwen3_moe(layers: int, hidden: int, expert: int, heads: int) -> dict[str, Any]:
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": expert}
    return _config("qwen3_moe", layers, hidden, 3 * hidden, heads, 4, 151936, 40960, head_dim=128, **experts)


def _gemma3(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    more = {"head_dim": head_dim, "sliding_window": 1024}
    return _config("gemma3_text", layers, hidden, intermediate, heads, kv_heads, 262208, 131072, **more)


def _deepseek(
    kind: str, layers: int, hidden: int, dense: int, expert: int, heads: int, vocab: int, **more: Any
) -> dict[str, Any]:
    latent = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
    more = {"moe_intermediate_size": expert, "first_k_dense_replace": 1, **latent, **more}
    return _config(kind, layers, hidden, dense, heads, heads, vocab, 163840, **more)


def _gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    more = {"num_experts_per_tok": 4, "sliding_window": 128, "quantization_config": quantization}
    return _config("gpt_oss", layers, 2880, 2880, 64, 8, 201088, 131072, num_local_experts=experts, **more)


def _llama4(experts: int, step: int, context: int) -> dict[str, Any]:
    more = {"num_local_experts": experts, "num_experts_per_tok": 1, "interleave_moe_layer_step": step}
    return _config("llama4_text", 48, 5120, 8192, 40, 8, 202048, context, **more)


def _chatglm(layers: int, vocab: int, context: int) -> dict[str, Any]:
    return {
        "model_type": "chatglm",
        "num_layers": layers,
        "hidden_size": 4096,
        "ffn_hidden_size": 13696,
        "num_attention_heads": 32,
        "kv_channels": 128,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "padded_vocab_size": vocab,
        "seq_length": context,
        "add_qkv_bias": True,
        "add_bias_linear": False,
    }


_MIXTRAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
_V2 = {"n_shared_experts": 2, "num_experts_per_tok": 6}
_V3 = {
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "q_lora_rank": 1536,
    "first_k_dense_replace": 3,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _llama3(16, 2048, 8192, 32, tie_word_embeddings=True),
    "llama-3.2-3b": _llama3(28, 3072, 8192, 24, tie_word_embeddings=True),
    "llama-3.1-8b": _llama3(32, 4096, 14336, 32),
    "llama-3.3-70b": _llama3(80, 8192, 28672, 64),
    "llama-3.1-405b": _llama3(126, 16384, 53248, 128),
    "llama-2-7b": _config("llama", 32, 4096, 11008, 32, 32, 32000, 4096),
    "llama-2-13b": _config("llama", 40, 5120, 13824, 40, 40, 32000, 4096),
    "llama-2-70b": _config("llama", 80, 8192, 28672, 64, 8, 32000, 4096),
    "llama-4-scout": _llama4(16, 1, 10485760),
    "llama-4-maverick": _llama4(128, 2, 1048576),
    "qwen2.5-0.5b": _qwen25(24, 896, 4864, 14, 2, 151936),
    "qwen2.5-1.5b": _qwen25(28, 1536, 8960, 12, 2, 151936),
    "qwen2.5-3b": _qwen25(36, 2048, 11008, 16, 2, 151936),
    "qwen2.5-7b": _qwen25(28, 3584, 18944, 28, 4, 152064),
    "qwen2.5-14b": _qwen25(48, 5120, 13824, 40, 8, 152064),
    "qwen2.5-32b": _qwen25(64, 5120, 27648, 40, 8, 152064),
    "qwen2.5-72b": _qwen25(80, 8192, 29568, 64, 8, 152064),
    "qwen2-57b-a14b": _config(
        "qwen2_moe",
        28,
        3584,
        18944,
        28,
        4,
        151936,
        32768,
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=2560,
        shared_expert_intermediate_size=20480,
    ),
    "qwen3-0.6b": _qwen3(28, 1024, 3072, 16, True),
    "qwen3-1.7b": _qwen3(28, 2048, 6144, 16, True),
    "qwen3-4b": _qwen3(36, 2560, 9728, 32, True),
    "qwen3-8b": _qwen3(36, 4096, 12288, 32, False),
    "qwen3-14b": _qwen3(40, 5120, 17408, 40, False),
    "qwen3-32b": _qwen3(64, 5120, 25600, 64, False),
    "qwen3-30b-a3b": _qwen3_moe(48, 2048, 768, 32),
    "qwen3-235b-a22b": _qwen3_moe(94, 4096, 1536, 64),
    "mistral-7b": _config("mistral", 32, 4096, 14336, 32, 8, 32768, 32768, sliding_window=None),
    "mistral-nemo-12b": _config("mistral", 40, 5120, 14336, 32, 8, 131072, 131072, head_dim=128, sliding_window=None),
    "mistral-small-24b": _config("mistral", 40, 5120, 32768, 32, 8, 131072, 32768, head_dim=128, sliding_window=None),
    "mistral-large-123b": _config("mistral", 88, 12288, 28672, 96, 8, 32768, 131072, sliding_window=None),
    "mixtral-8x7b": _config("mixtral", 32, 4096, 14336, 32, 8, 32000, 32768, **_MIXTRAL),
    "mixtral-8x22b": _config("mixtral", 56, 6144, 16384, 48, 8, 32768, 65536, **_MIXTRAL),
    "gemma-2b": _config("gemma", 18, 2048, 16384, 8, 1, 256000, 8192),
    "gemma-7b": _config("gemma", 28, 3072, 24576, 16, 16, 256000, 8192),
    "gemma-2-9b": _config("gemma2", 42, 3584, 14336, 16, 8, 256000, 8192),
    "gemma-2-27b": _config("gemma2", 46, 4608, 36864, 32, 16, 256000, 8192, head_dim=128),
    "gemma-3-4b": _gemma3(34, 2560, 10240, 8, 4, 256),
    "gemma-3-12b": _gemma3(48, 3840, 15360, 16, 8, 256),
    "gemma-3-27b": _gemma3(62, 5376, 21504, 32, 16, 128),
    "phi-2": _config("phi", 32, 2560, 10240, 32, 32, 51200, 2048),
    "phi-3-mini": _config("phi3", 32, 3072, 8192, 32, 32, 32064, 4096, sliding_window=2047),
    "phi-3-medium": _config("phi3", 40, 5120, 17920, 40, 10, 32064, 4096, sliding_window=2047),
    "phi-4": _config("phi3", 40, 5120, 17920, 40, 10, 100352, 16384, sliding_window=None),
    "deepseek-v2-lite": _deepseek("deepseek_v2", 27, 2048, 10944, 1408, 16, 102400, n_routed_experts=64, **_V2),
    "deepseek-v2": _deepseek(
        "deepseek_v2", 60, 5120, 12288, 1536, 128, 102400, n_routed_experts=160, q_lora_rank=1536, **_V2
    ),
    "deepseek-v3": _deepseek("deepseek_v3", 61, 7168, 18432, 2048, 128, 129280, **_V3),
    "deepseek-r1": _deepseek("deepseek_v3", 61, 7168, 18432, 2048, 128, 129280, **_V3),
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
    "chatglm3-6b": _chatglm(28, 65024, 8192),
    "glm-4-9b": _chatglm(40, 151552, 131072),
    "yi-6b": _config("llama", 32, 4096, 11008, 32, 4, 64000, 4096),
    "yi-34b": _config("llama", 60, 7168, 20480, 56, 8, 64000, 4096),
    "baichuan2-7b": _config("baichuan", 32, 4096, 11008, 32, 32, 125696, 4096),
    "baichuan2-13b": _config("baichuan", 40, 5120, 13696, 40, 40, 125696, 4096),
    "falcon-180b": _config(
        "falcon", 80, 14848, 4 * 14848, 232, 8, 65024, 2048, new_decoder_architecture=True, bias=False
    ),
    "gpt-j-6b": _config("gptj", 28, 4096, 16384, 16, 16, 50400, 2048),
    "opt-13b": _config("opt", 40, 5120, 20480, 40, 40, 50272, 2048),
}

MODELS: dict[str, ModelShape] = {name: shape_from_config(config) for name, config in CONFIGS.items()}

# Where their checkpoints are on the Hugging Face hub: those that follow instructions, if there are any.
HUB: dict[str, str] = {
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.3-70b": "meta-llama/Llama-3.3-70B-Instruct",
    "llama-3.1-405b": "meta-llama/Llama-3.1-405B-Instruct",
    "llama-2-7b": "meta-llama/Llama-2-7b-chat-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-chat-hf",
    "llama-2-70b": "meta-llama/Llama-2-70b-chat-hf",
    "llama-4-scout": "meta-llama/Llama-4-Scout-17B-16E-Instruct",
    "llama-4-maverick": "meta-llama/Llama-4-Maverick-17B-128E-Instruct",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2.5-14b": "Qwen/Qwen2.5-14B-Instruct",
    "qwen2.5-32b": "Qwen/Qwen2.5-32B-Instruct",
    "qwen2.5-72b": "Qwen/Qwen2.5-72B-Instruct",
    "qwen2-57b-a14b": "Qwen/Qwen2-57B-A14B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-14b": "Qwen/Qwen3-14B",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "qwen3-235b-a22b": "Qwen/Qwen3-235B-A22B",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "mistral-nemo-12b": "mistralai/Mistral-Nemo-Instruct-2407",
    "mistral-small-24b": "mistralai/Mistral-Small-24B-Instruct-2501",
    "mistral-large-123b": "mistralai/Mistral-Large-Instruct-2407",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "mixtral-8x22b": "mistralai/Mixtral-8x22B-Instruct-v0.1",
    "gemma-2b": "google/gemma-2b-it",
    "gemma-7b": "google/gemma-7b-it",
    "gemma-2-9b": "google/gemma-2-9b-it",
    "gemma-2-27b": "google/gemma-2-27b-it",
    "gemma-3-4b": "google/gemma-3-4b-it",
    "gemma-3-12b": "google/gemma-3-12b-it",
    "gemma-3-27b": "google/gemma-3-27b-it",
    "phi-2": "microsoft/phi-2",
    "phi-3-mini": "microsoft/Phi-3-mini-4k-instruct",
    "phi-3-medium": "microsoft/Phi-3-medium-4k-instruct",
    "phi-4": "microsoft/phi-4",
    "deepseek-v2-lite": "deepseek-ai/DeepSeek-V2-Lite-Chat",
    "deepseek-v2": "deepseek-ai/DeepSeek-V2-Chat",
    "deepseek-v3": "deepseek-ai/DeepSeek-V3",
    "deepseek-r1": "deepseek-ai/DeepSeek-R1",
    "gpt-oss-20b": "openai/gpt-oss-20b",
    "gpt-oss-120b": "openai/gpt-oss-120b",
    "chatglm3-6b": "THUDM/chatglm3-6b",
    "glm-4-9b": "THUDM/glm-4-9b-chat",
    "yi-6b": "01-ai/Yi-6B-Chat",
    "yi-34b": "01-ai/Yi-34B-Chat",
    "baichuan2-7b": "baichuan-inc/Baichuan2-7B-Chat",
    "baichuan2-13b": "baichuan-inc/Baichuan2-13B-Chat",
    "falcon-180b": "tiiuae/falcon-180B-chat",
    "gpt-j-6b": "EleutherAI/gpt-j-6b",
    "opt-13b": "facebook/opt-13b",
}
