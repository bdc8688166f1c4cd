"""Published figures of TensorRT-LLM that the latency model is held against.

Throughput: NVIDIA, TensorRT-LLM documentation, "Overview" of performance (docs/source/performance/perf-overview.md as
of release 1.0): output tokens a second of `trtllm-bench throughput`, all requests queued at once, ModelOpt checkpoints,
PyTorch backend; and the number of requests that each pair of lengths was measured with.

Latency: NVIDIA, "NIM for LLMs benchmarking guide", Performance, Llama-3.3-70b-instruct 1.8.0 (TensorRT-LLM inside), two
GPUs, FP8: time to first token and inter-token latency at a given concurrency, measured by a client. Only what comes
before the queue builds up is taken: what follows measures the client's patience.
"""

from typing import NamedTuple

from serve.engines.simulated.hardware import Precision


class Throughput(NamedTuple):
    """One cell of a throughput table; lengths in tokens."""

    model: str
    gpu: str
    tensor_parallel: int
    weights: Precision
    input_tokens: int
    output_tokens: int
    output_tokens_per_s: float


class Latency(NamedTuple):
    """One line of a latency table."""

    model: str
    gpu: str
    tensor_parallel: int
    input_tokens: int
    output_tokens: int
    concurrency: int
    ttft_s: float
    itl_s: float


REQUESTS = {
    (128, 128): 30000,
    (128, 2048): 3000,
    (128, 4096): 1500,
    (500, 2000): 3000,
    (1000, 1000): 3000,
    (1000, 2000): 1500,
    (2048, 128): 3000,
    (2048, 2048): 1500,
    (5000, 500): 1500,
    (20000, 2000): 1000,
}


def _table(model: str, gpu: str, tensor_parallel: int, weights: Precision, *cells: float) -> list[Throughput]:
    return [
        Throughput(model, gpu, tensor_parallel, weights, *lengths, cell)
        for lengths, cell in zip(REQUESTS, cells, strict=True)
    ]


HOPPER = [
    *_table("llama-3.1-8b", "h200", 1, "fp8", 27911, 26221, 18027, 20770, 17744, 16828, 3538, 12194, 3902, 1804),
    *_table("llama-3.1-8b", "h100", 1, "fp8", 28312, 22714, 14325, 17660, 15220, 13899, 3450, 9305, 3459, 1351),
    *_table("llama-3.3-70b", "h200", 1, "fp8", 3803, 4336, 2872, 3666, 2909, 2994, 442, 2003, 566, 283),
    *_table("llama-3.3-70b", "h100", 2, "fp8", 6378, 6651, 4199, 5222, 4205, 4146, 762, 3082, 898, 437),
    *_table("llama-3.1-405b", "h200", 8, "fp8", 3814, 5348, 4741, 4724, 3330, 3722, 456, 2948, 650, 505),
    *_table("llama-3.1-405b", "h100", 8, "fp8", 3627, 4340, 3116, 3994, 2919, 2895, 453, 2296, 610, 345),
]
BLACKWELL = [
    *_table("llama-3.3-70b", "b200", 1, "fp4", 11147, 9922, 6831, 7762, 7007, 6271, 1339, 4783, 1459, 665),
    *_table("llama-3.1-405b", "b200", 4, "fp4", 6281, 8020, 6345, 6244, 5209, 4933, 749, 4212, 1048, 672),
]

LATENCY = [
    Latency("llama-3.3-70b", "h100", 2, 500, 2000, 1, 0.04777, 0.01891),
    Latency("llama-3.3-70b", "h100", 2, 500, 2000, 5, 0.12653, 0.01904),
    Latency("llama-3.3-70b", "h100", 2, 500, 2000, 25, 0.14763, 0.02169),
    Latency("llama-3.3-70b", "h100", 2, 500, 2000, 50, 0.18164, 0.02397),
    Latency("llama-3.3-70b", "h100", 2, 500, 2000, 100, 0.22977, 0.02998),
    Latency("llama-3.3-70b", "h200", 2, 500, 2000, 1, 0.04638, 0.01679),
    Latency("llama-3.3-70b", "h200", 2, 500, 2000, 5, 0.12167, 0.01636),
    Latency("llama-3.3-70b", "h200", 2, 500, 2000, 25, 0.16985, 0.01864),
    Latency("llama-3.3-70b", "h200", 2, 500, 2000, 50, 0.19084, 0.01979),
    Latency("llama-3.3-70b", "h200", 2, 500, 2000, 100, 0.23818, 0.02606),
    Latency("llama-3.3-70b", "h100", 2, 5000, 500, 1, 0.40677, 0.01858),
    Latency("llama-3.3-70b", "h100", 2, 5000, 500, 5, 0.5467, 0.02183),
    Latency("llama-3.3-70b", "h100", 2, 5000, 500, 25, 0.68869, 0.03875),
    Latency("llama-3.3-70b", "h100", 2, 5000, 500, 50, 0.83451, 0.05973),
]
