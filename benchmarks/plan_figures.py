"""Published figures that plans are held against, besides those of `benchmarks/latency_figures.py`.

Throughput: NVIDIA, TensorRT-LLM documentation, output tokens a second.
- "1.0": docs/source/performance/perf-overview.md of release 1.0, all GPUs together. Of MoE models on several GPUs
  attention data parallelism was on, as the page's options for them say.
- "1.2": docs/source/developer-guide/perf-overview.md of release 1.2, of each GPU; DEP: attention data parallelism and
  expert parallelism.
- "0.6.1": docs/source/performance.md of release 0.6.1 (L40S: 0.5), of each GPU; static batches.
"""

from typing import NamedTuple

from serve.engines.simulated.hardware import Precision

PAIRS_1_0 = (
    (128, 128), (128, 2048), (128, 4096), (500, 2000), (1000, 1000), (1000, 2000), (2048, 128), (2048, 2048),
    (5000, 500), (20000, 2000),
)  # fmt: skip
PAIRS_1_2 = ((1000, 1000), (1024, 1024), (1024, 8192), (1024, 32768), (8192, 1024), (32768, 1024))


class Row(NamedTuple):
    """One column of a table: a model on some GPUs, for several pairs of lengths; None: not published."""

    group: str
    model: str
    gpu: str
    tensor: int
    pipeline: int
    data_parallel: bool
    weights: Precision
    attention: Precision | None
    kv_cache: Precision
    per_gpu: bool
    cells: tuple[float | None, ...]

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Lengths of prompts and outputs."""
        return PAIRS_1_2 if self.per_gpu else PAIRS_1_0


def _row_1_0(
    group: str, model: str, gpu: str, tensor: int, pipeline: int, weights: Precision, *cells: float | None, moe: bool
) -> Row:
    apart = moe and tensor > 1
    return Row(group, model, gpu, tensor, pipeline, apart, weights, None, "fp8", False, cells)


def _dense(gpu: str, model: str, tensor: int, pipeline: int, *cells: float | None) -> Row:
    return _row_1_0(f"1.0, {gpu}, dense", model, gpu, tensor, pipeline, "fp4", *cells, moe=False)


def _experts(gpu: str, model: str, tensor: int, pipeline: int, weights: Precision, *cells: float | None) -> Row:
    return _row_1_0(f"1.0, {gpu}, experts", model, gpu, tensor, pipeline, weights, *cells, moe=True)


def _row_1_2(
    gpu: str, model: str, gpus: int, weights: Precision, *cells: float | None, attention: Precision | None = None,
    kv_cache: Precision = "fp8",
) -> Row:  # fmt: skip
    return Row(f"1.2, {gpu}, experts", model, gpu, gpus, 1, gpus > 1, weights, attention, kv_cache, True, cells)


def _gpt_oss(gpu: str, size: str, gpus: int, kv_cache: Precision, *cells: float | None) -> Row:
    return _row_1_2(gpu, f"gpt-oss-{size}", gpus, "mxfp4", *cells, attention="bf16", kv_cache=kv_cache)


_RTX, _70B, _30B, _235B = "rtx-pro-6000", "llama-3.3-70b", "qwen3-30b-a3b", "qwen3-235b-a22b"
_MAVERICK, _SCOUT = "llama-4-maverick", "llama-4-scout"

ROWS = (
    _dense("gb200", _70B, 1, 1, 12189, 11309, 7849, 9028, 7326, 6513, 1450, 5646, 1602, 755),
    _dense("gb200", "llama-3.1-405b", 4, 1, 6740, 8151, 6608, 6540, 5389, 5135, 797, 4407, 1112, 739),
    _dense(_RTX, _70B, 1, 1, 3264, 2422, 1349, 1856, 1787, 1594, 393, 1074, 401, 142),
    _dense(_RTX, _70B, 1, 2, 6172, 4993, 2893, 4114, 3707, 2993, 813, 2336, 812, 319),
    _dense(_RTX, _70B, 1, 4, 9641, 7922, 4978, 6939, 5961, 5274, 1511, 3870, 1511, 630),
    _dense(_RTX, _70B, 1, 8, 11881, 9833, 7352, 9435, 8166, 6943, 2495, 6078, 2491, 1148),
    _dense(_RTX, "llama-3.1-405b", 1, 8, 4452, 2981, None, None, 2369, 1931, 579, 1442, None, None),
    _experts(_RTX, _SCOUT, 2, 2, "fp4", 18644, 12321, 7643, None, 9476, 8919, 2615, 6208, 2662, None),
    _experts(_RTX, _SCOUT, 4, 2, "fp4", 23454, 21035, 13421, None, 15781, 16434, 2941, 10410, None, None),
    _experts(_RTX, _30B, 1, 1, "fp4", 28011, 12540, 7491, 10695, 9910, 8378, 3257, 5908, 2530, 871),
    _experts(_RTX, _30B, 2, 1, "fp4", 32646, 22744, 15049, 17266, 16431, 13323, 3785, 10679, 3799, 1558),
    _experts(_RTX, _30B, 4, 1, "fp4", 36819, 35715, 28139, 26175, 24046, 25131, 4311, 18134, 5212, 2551),
    _experts(_RTX, _30B, 8, 1, "fp4", 39490, 52676, 33895, 44088, 31785, 28881, 4798, 22391, 5965, None),
    _experts(_RTX, _235B, 2, 4, "fp4", 18890, 12494, 7715, 11157, 10697, 10109, 3181, 6712, 3173, None),
    _experts("b200", _SCOUT, 1, 1, "fp4", 25342, 14699, 8932, 11977, 10591, 9356, 3137, 7152, 2937, 1644),
    _experts("b200", _30B, 1, 1, "fp4", 39827, 37844, 24953, 27817, 25828, 22051, 6251, 17554, 6142, 2944),
    _experts("b200", _235B, 8, 1, "fp4", 63362, 66057, 39496, 57117, 42391, 34105, 7329, 26854, 8190, 4453),
    _experts("b200", _MAVERICK, 8, 1, "fp4", 124323, 112676, 68170, None, 79617, 63766, 18088, 52195, None, 12678),
    _experts("h200", _SCOUT, 4, 1, "fp8", 30354, 34316, 21332, 24630, 21636, 18499, 3699, 14949, 4605, 2105),
    _experts("h200", _235B, 8, 1, "fp8", 30429, 42821, 26852, 28026, 23789, 22061, 3331, 16672, 3623, 1876),
    _experts("h200", _MAVERICK, 8, 1, "fp8", 63994, 40572, 24616, 37835, 31782, 34734, 7307, 20957, 8456, 4106),
    _experts("h100", _SCOUT, 4, 1, "fp8", None, 15130, 8603, 12399, 12129, 9838, 3253, 7972, 3342, None),
    _experts("h100", _235B, 8, 1, "fp8", None, 19658, 12447, 18351, 14898, 15136, None, 9924, 3225, None),
    _row_1_2("b200", "deepseek-r1", 4, "fp4", 6463, 6430, 3862, 1451, 1168, None, attention="bf16"),
    _row_1_2("gb200", "deepseek-r1", 4, "fp4", 6939, 6924, 4379, 1465, 1192, None, attention="bf16"),
    _row_1_2("h200", "deepseek-r1", 8, "fp8", 1627, 1620, 1218, 438, None, None),
    _gpt_oss("b200", "120b", 2, "fp8", 25943, 25870, 17289, 6279, 6111, 1392),
    _gpt_oss("gb200", "120b", 1, "fp8", 27198, 26609, 14800, 5556, 6835, 1645),
    _gpt_oss("h200", "120b", 1, "bf16", 6868, 6798, 3543, None, 1828, 519),
    _gpt_oss("h100", "120b", 4, "bf16", 4685, 4715, None, 1177, 1169, 333),
    _gpt_oss("b200", "20b", 1, "fp8", 53812, 53491, 34702, 14589, 11904, 2645),
    _gpt_oss("h200", "20b", 1, "bf16", 13858, 13890, 12743, None, 4015, 915),
    _gpt_oss("h100", "20b", 1, "bf16", 11557, 11403, 8617, None, 3366, 785),
    _row_1_2("b200", _MAVERICK, 4, "fp4", 11337, 11227, 5174, 2204, 3279, 859),
    _row_1_2("h200", _MAVERICK, 8, "fp8", 4146, 4180, 1157, 679, 1276, None),
    _row_1_2("b200", _235B, 4, "fp4", 5764, 5756, 3389, 1255, 1410, 319),
    _row_1_2("h200", _235B, 4, "fp8", 3288, 3268, 1417, None, 627, 134),
    _row_1_2("h100", _235B, 8, "fp8", 1932, 1935, 873, None, None, None),
    _row_1_2("b200", _30B, 1, "fp4", 26971, 26611, 13497, 4494, 5735, 1265),
)


class Static(NamedTuple):
    """One line of the tables of static batches, per GPU."""

    gpu: str
    model: str
    tensor: int
    weights: Precision
    batch: int
    input_tokens: int
    output_tokens: int
    tokens_per_s: float


def _static(gpu: str, weights: Precision, *lines: tuple[str, int, int, int, int, float]) -> list[Static]:
    return [Static(gpu, line[0], line[1], weights, *line[2:]) for line in lines]


_7B = "llama-2-7b"
STATIC = [
    *_static(
        "a100-80gb",
        "bf16",
        ("gpt-j-6b", 1, 512, 128, 128, 6374),
        ("gpt-j-6b", 2, 120, 128, 2048, 2192),
        ("gpt-j-6b", 1, 60, 2048, 128, 670),
        ("gpt-j-6b", 2, 64, 2048, 2048, 903),
        (_7B, 1, 384, 128, 128, 5586),
        (_7B, 1, 60, 128, 2048, 1928),
        (_7B, 1, 52, 2048, 128, 591),
        (_7B, 2, 64, 2048, 2048, 782),
        ("llama-2-70b", 4, 1280, 128, 128, 670),
        ("llama-2-70b", 4, 240, 128, 2048, 525),
        ("llama-2-70b", 4, 120, 2048, 128, 79),
    ),
    *_static(
        "l40s",
        "fp8",
        ("gpt-j-6b", 1, 64, 128, 128, 3630),
        ("gpt-j-6b", 1, 64, 128, 2048, 1859),
        ("gpt-j-6b", 1, 32, 2048, 128, 616),
        ("gpt-j-6b", 1, 32, 2048, 2048, 757),
        (_7B, 1, 64, 128, 128, 3240),
        (_7B, 1, 64, 128, 2048, 1622),
        (_7B, 1, 32, 2048, 128, 581),
        (_7B, 1, 16, 2048, 2048, 531),
    ),
    *_static(
        "h100",
        "fp8",
        ("gpt-j-6b", 1, 1024, 128, 128, 26150),
        ("gpt-j-6b", 1, 120, 128, 2048, 8011),
        ("gpt-j-6b", 1, 64, 2048, 128, 2551),
        ("gpt-j-6b", 1, 64, 2048, 2048, 3327),
        (_7B, 1, 768, 128, 128, 19694),
        (_7B, 1, 112, 128, 2048, 6818),
        (_7B, 1, 80, 2048, 128, 2244),
        (_7B, 1, 48, 2048, 2048, 2740),
    ),
]


class Fact(NamedTuple):
    """One published number of a model."""

    model: str
    what: str
    published: float
    source: str


_HUB = "Hugging Face hub, parameters of the model's safetensors files"
_INSIGHTS = "Zhao et al., Insights into DeepSeek-V3, 2025, table 1"
_GGUF = "huggingface.co/dranger003/c4ai-command-r-v01-iMat.GGUF, discussion 6: 2,048 tokens"
_CARD = "OpenAI, gpt-oss-120b & gpt-oss-20b Model Card, 2025, table 1"
_TECHNIQUES = "NVIDIA, Mastering LLM Techniques: Inference Optimization, 2023: 2 GB for 4,096 tokens"
_DYNAMO = "ai-dynamo/dynamo, README of its TensorRT-LLM example, February 2025: 26.91 GiB for 220,480 tokens"
_MIB = float(1 << 20)

PARAMETERS = (
    Fact("llama-3.1-8b", "weights", 8_030_261_248, _HUB),
    Fact("llama-3.3-70b", "weights", 70_553_706_496, _HUB),
    Fact("llama-3.1-405b", "weights", 405_853_388_800, _HUB),
    Fact("qwen2.5-72b", "weights", 72_706_203_648, _HUB),
    Fact("qwen3-32b", "weights", 32_762_123_264, _HUB),
    Fact("qwen3-235b-a22b", "weights", 235_093_634_560, _HUB),
    Fact("mistral-large-123b", "weights", 122_610_069_504, _HUB),
    Fact("mixtral-8x7b", "weights", 46_702_792_704, _HUB),
    Fact("gemma-2-27b", "weights", 27_227_128_320, _HUB),
    Fact("phi-4", "weights", 14_659_507_200, _HUB),
    Fact("glm-4-9b", "weights", 9_399_951_360, _HUB),
    Fact("yi-34b", "weights", 34_388_917_248, _HUB),
    Fact("baichuan2-13b", "weights", 13_896_668_160, _HUB),
    Fact("deepseek-v2", "weights", 236e9, "DeepSeek-AI, DeepSeek-V2, 2024: 236B"),
    Fact("deepseek-v3", "weights", 671e9, "DeepSeek-AI, DeepSeek-V3 Technical Report, 2024: 671B"),
    Fact("gpt-oss-120b", "weights", 116.83e9, _CARD),
    Fact(
        "llama-4-scout",
        "weights",
        109e9,
        "Meta, model card of Llama 4: 109B with the vision part, which is not counted",
    ),
    Fact("deepseek-v3", "weights that a token visits", 37e9, "DeepSeek-AI, DeepSeek-V3 Technical Report, 2024: 37B"),
    Fact("mixtral-8x7b", "weights that a token visits", 12.9e9, "Jiang et al., Mixtral of Experts, 2024: 12.9B"),
    Fact("qwen3-235b-a22b", "weights that a token visits", 22e9, "Qwen3 Technical Report, 2025: 22B"),
)

# In bytes, of the whole checkpoint.
WEIGHT_BYTES = (
    Fact("gpt-oss-120b", "checkpoint, MXFP4", 60.8 * (1 << 30), _CARD),
    Fact("gpt-oss-20b", "checkpoint, MXFP4", 12.8 * (1 << 30), _CARD),
    Fact(
        "llama-3.1-8b", "weights, BF16", 14.9595 * (1 << 30), "vllm-project/vllm#12330: 'model weights took 14.9595 GB'"
    ),
    Fact("llama-3.3-70b", "weights, BF16", 141.1e9, "Hugging Face hub, size of the model's safetensors files"),
)

# In bytes a token, BF16.
KV_BYTES = (
    Fact("deepseek-v3", "keys and values of a token", 70_272, _INSIGHTS),
    Fact("qwen2.5-72b", "keys and values of a token", 327_680, _INSIGHTS),
    Fact("llama-3.1-405b", "keys and values of a token", 516_096, _INSIGHTS),
    Fact("llama-2-7b", "keys and values of a token", 2 * (1 << 30) / 4096, _TECHNIQUES),
    Fact("opt-13b", "keys and values of a token", 800 * 1024, "Kwon et al., PagedAttention, 2023: 800 KB"),
    Fact("llama-3.1-8b", "keys and values of a token", 256 * _MIB / 2048, _GGUF),
    Fact("llama-3.3-70b", "keys and values of a token", 640 * _MIB / 2048, _GGUF),
    Fact("mixtral-8x7b", "keys and values of a token", 256 * _MIB / 2048, _GGUF),
    Fact("yi-34b", "keys and values of a token", 480 * _MIB / 2048, _GGUF),
    Fact("llama-3.1-8b", "keys and values of a token", 26.91 * (1 << 30) / 220_480, _DYNAMO),
)
