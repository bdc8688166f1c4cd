"""Known models have exactly as many weights as their publishers say, and keys and values of the published size."""

import pytest

from serve.engines.simulated.known_models import MODELS

# Parameters of the safetensors files, as the Hugging Face hub counts them; of Llama 1 and 2, GPT-J, OPT and Baichuan:
# of the PyTorch files. DeepSeek's count is without the layer for multi-token prediction.
PUBLISHED = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "mistral-7b": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "mistral-large-123b": 122_610_069_504,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_630_071_296,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-27b": 27_009_346_304,
    "phi-2": 2_779_683_840,
    "phi-3-mini": 3_821_079_552,
    "phi-3-medium": 13_960_238_080,
    "phi-4": 14_659_507_200,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v3": 671_026_419_200,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "chatglm3-6b": 6_243_584_000,
    "glm-4-9b": 9_399_951_360,
    "yi-6b": 6_061_035_520,
    "yi-34b": 34_388_917_248,
    "baichuan2-7b": 7_505_973_248,
    "baichuan2-13b": 13_896_668_160,
    "gpt-j-6b": 6_050_882_784,
    "opt-13b": 12_853_473_280,
}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_parameters_are_those_that_were_published(name: str, parameters: int) -> None:
    assert MODELS[name].parameters == parameters


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("mixtral-8x7b", 12.9),  # Jiang et al., "Mixtral of Experts", 2024
        ("mixtral-8x22b", 39.0),  # Mistral AI, "Cheaper, Better, Faster, Stronger", 2024
        ("deepseek-v2", 21.0),  # "DeepSeek-V2", 2024
        ("deepseek-v3", 37.0),  # "DeepSeek-V3 Technical Report", 2024
        ("qwen3-30b-a3b", 3.3),  # Qwen, "Qwen3 Technical Report", 2025
        ("qwen3-235b-a22b", 22.0),
        ("llama-4-scout", 17.0),  # Meta, model card of Llama 4
        ("llama-4-maverick", 17.0),
    ],
)
def test_each_token_visits_the_published_part_of_a_mixture_of_experts(name: str, billions: float) -> None:
    assert MODELS[name].active_parameters / 1e9 == pytest.approx(billions, rel=0.03)


@pytest.mark.parametrize(
    ("name", "published_bytes"),
    [
        # Zhao et al., "Insights into DeepSeek-V3: Scaling Challenges and Reflections on Hardware", 2025, table 1
        ("deepseek-v3", 70_272),
        ("qwen2.5-72b", 327_680),
        ("llama-3.1-405b", 516_096),
        # NVIDIA, "Mastering LLM Techniques: Inference Optimization": 2 GiB for 4,096 tokens
        ("llama-2-7b", 2 * 1024**3 // 4096),
        # Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023: 800 KiB
        ("opt-13b", 800 * 1024),
    ],
)
def test_keys_and_values_have_the_published_size(name: str, published_bytes: int) -> None:
    assert MODELS[name].kv_bytes_per_token("bf16") == published_bytes


def test_precisions_of_keys_and_values() -> None:
    assert MODELS["llama-3.1-8b"].kv_bytes_per_token("bf16") == 131072
    assert MODELS["llama-3.3-70b"].kv_bytes_per_token("fp8") == 163840


def test_windows_bound_keys_and_values() -> None:
    gemma = MODELS["gemma-3-27b"]
    assert (gemma.layers, gemma.windowed_layers, gemma.window_tokens) == (62, 52, 1024)
    short, long = gemma.kv_bytes(1000, "bf16"), gemma.kv_bytes(101_024, "bf16")
    assert short == 1000 * gemma.kv_bytes_per_token("bf16")
    per_layer = 2 * 16 * 128 * 2
    assert long == per_layer * (10 * 101_024 + 52 * 1024)
    assert MODELS["gpt-oss-120b"].windowed_layers == 18
    assert MODELS["llama-4-scout"].windowed_layers == 36
    assert MODELS["mistral-7b"].windowed_layers == 0
