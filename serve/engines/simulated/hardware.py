"""GPUs as their datasheets describe them, and models as their config.json does."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from serve.core.strict_model import StrictModel

Precision = Literal["bf16", "fp8", "fp4"]
Generation = Literal["ampere", "ada", "hopper", "blackwell"]

BYTES_PER_WEIGHT: dict[Precision, float] = {
    "bf16": 2.0,
    "fp8": 1.0,
    "fp4": 0.5625,  # NVFP4: 4 bits, and an FP8 scale for each 16 of them
}


class GpuDatasheet(StrictModel):
    """One GPU. Dense rates: datasheets often print twice as much, with sparsity."""

    name: str = Field(description="What to call it in messages.")
    generation: Generation = Field(description="Decides what of the datasheet is reached, unless that is configured.")
    bf16_tflops: PositiveFloat = Field(description="Dense FP16/BF16 tensor rate, 1e12 operations a second.")
    fp8_tflops: PositiveFloat = Field(description="Dense FP8 tensor rate; the FP16 rate where there is no FP8.")
    fp4_tflops: PositiveFloat = Field(description="Dense FP4 tensor rate; the FP8 rate where there is no FP4.")
    memory_gb: PositiveFloat = Field(description="Memory, 1e9 bytes.")
    memory_gb_per_s: PositiveFloat = Field(description="Memory bandwidth, 1e9 bytes a second.")
    link_gb_per_s: PositiveFloat = Field(description="Bandwidth to the other GPUs of the node, one way, 1e9 bytes/s.")

    def tflops(self, precision: Precision) -> float:
        """Return the dense rate for a precision of weights."""
        return {"bf16": self.bf16_tflops, "fp8": self.fp8_tflops, "fp4": self.fp4_tflops}[precision]


def _gpu(
    name: str, generation: Generation, bf16: float, fp8: float, fp4: float, memory: float, bandwidth: float, link: float
) -> GpuDatasheet:
    return GpuDatasheet(
        name=name,
        generation=generation,
        bf16_tflops=bf16,
        fp8_tflops=fp8,
        fp4_tflops=fp4,
        memory_gb=memory,
        memory_gb_per_s=bandwidth,
        link_gb_per_s=link,
    )


# Sources: NVIDIA's product pages and datasheets. A100: "NVIDIA A100 Tensor Core GPU" (80 GB SXM). L40S: "NVIDIA L40S"
# (no NVLink: PCIe 4.0 x16). H100: "NVIDIA H100 Tensor Core GPU" (SXM; rates with sparsity halved). H200: "NVIDIA H200
# Tensor Core GPU" (SXM). B200: "NVIDIA DGX B200" (eight GPUs: 36 / 72 / 144 PFLOPS BF16 / FP8 / FP4 with sparsity,
# 64 TB/s HBM, 14.4 TB/s NVLink both ways). Links: half of the bidirectional figure.
GPUS: dict[str, GpuDatasheet] = {
    "a100-80gb": _gpu("A100 80GB SXM", "ampere", 312, 312, 312, 80, 2039, 300),
    "l40s": _gpu("L40S", "ada", 362, 733, 733, 48, 864, 32),
    "h100": _gpu("H100 80GB SXM", "hopper", 989.5, 1979, 1979, 80, 3350, 450),
    "h200": _gpu("H200 141GB SXM", "hopper", 989.5, 1979, 1979, 141, 4800, 450),
    "b200": _gpu("B200 180GB", "blackwell", 2250, 4500, 9000, 180, 8000, 900),
}


class ModelShape(StrictModel):
    """A decoder-only transformer with grouped-query attention and gated feed-forward layers, dense or MoE."""

    layers: PositiveInt = Field(description="`num_hidden_layers`.")
    hidden: PositiveInt = Field(description="`hidden_size`.")
    heads: PositiveInt = Field(description="`num_attention_heads`.")
    kv_heads: PositiveInt = Field(description="`num_key_value_heads`.")
    head_dim: PositiveInt = Field(description="`head_dim`, or hidden_size / num_attention_heads.")
    intermediate: PositiveInt = Field(description="`intermediate_size`; of one expert in an MoE model.")
    vocab: PositiveInt = Field(description="`vocab_size`.")
    experts: NonNegativeInt = Field(default=0, description="Routed experts a layer; 0: dense.")
    experts_per_token: NonNegativeInt = Field(default=0, description="Experts that each token visits.")
    context_tokens: PositiveInt = Field(default=131072, description="`max_position_embeddings`.")

    @property
    def attention_weights(self) -> int:
        """Weights of a layer's four projections."""
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    @property
    def expert_weights(self) -> int:
        """Weights of a layer's feed-forward network, or of one of its experts."""
        return 3 * self.hidden * self.intermediate

    @property
    def weights(self) -> int:
        """Weights of all layers, without embeddings."""
        return self.layers * (self.attention_weights + max(1, self.experts) * self.expert_weights)

    @property
    def head_weights(self) -> int:
        """Weights of the output projection, which is kept in 16 bits."""
        return self.hidden * self.vocab

    def kv_bytes_per_token(self, kv_precision: Precision) -> float:
        """Return the size of one token's keys and values."""
        return 2 * self.layers * self.kv_heads * self.head_dim * BYTES_PER_WEIGHT[kv_precision]


def _shape(
    layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, vocab: int, head_dim: int = 128
) -> ModelShape:
    return ModelShape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=intermediate,
        vocab=vocab,
    )


# Sources: each model's config.json on Hugging Face.
MODELS: dict[str, ModelShape] = {
    "llama-3.2-1b": _shape(16, 2048, 32, 8, 8192, 128256, head_dim=64),
    "llama-3.1-8b": _shape(32, 4096, 32, 8, 14336, 128256),
    "llama-3.3-70b": _shape(80, 8192, 64, 8, 28672, 128256),
    "llama-3.1-405b": _shape(126, 16384, 128, 8, 53248, 128256),
    "qwen3-8b": _shape(36, 4096, 32, 8, 12288, 151936),
    "qwen3-32b": _shape(64, 5120, 64, 8, 25600, 151936),
    "mixtral-8x7b": ModelShape(
        layers=32,
        hidden=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        intermediate=14336,
        vocab=32000,
        experts=8,
        experts_per_token=2,
        context_tokens=32768,
    ),
    "qwen3-30b-a3b": ModelShape(
        layers=48,
        hidden=2048,
        heads=32,
        kv_heads=4,
        head_dim=128,
        intermediate=768,
        vocab=151936,
        experts=128,
        experts_per_token=8,
        context_tokens=40960,
    ),
}
