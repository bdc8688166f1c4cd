"""Split: how a model is cut into ranks, and what of its weights, keys and values each rank holds."""

import math
from dataclasses import dataclass

from pydantic import Field

from serve.core.parallel import ParallelLayout
from serve.core.strict_model import StrictModel
from serve.engines.simulated.hardware import BYTES_PER_WEIGHT, Precision
from serve.engines.simulated.model_shape import ModelShape

_HALF = BYTES_PER_WEIGHT["bf16"]  # of what is never quantized


class Precisions(StrictModel):
    """Precision of weights, and of keys and values."""

    weights: Precision = Field(default="bf16", description="Of the layers' matrices, and of their products.")
    attention: Precision | None = Field(default=None, description="Of attention's matrices; None: as `weights`.")
    kv_cache: Precision = Field(default="bf16", description="Of keys and values.")

    @property
    def of_attention(self) -> Precision:
        """Of attention's matrices."""
        return self.attention or self.weights


@dataclass(frozen=True)
class WeightBytes:
    """Weights of one rank, in bytes."""

    attention: float
    dense: float
    experts: float
    shared: float
    router: float
    embedding: float
    head: float
    vectors: float

    @property
    def total(self) -> float:
        """All of them."""
        return (
            self.attention
            + self.dense
            + self.experts
            + self.shared
            + self.router
            + self.embedding
            + self.head
            + self.vectors
        )


class Split(ParallelLayout):
    """How an engine is cut into `tensor` x `pipeline` ranks."""

    attention_dp: bool = Field(
        default=False, description="Every tensor rank computes the attention of its own sequences, with all heads."
    )

    @property
    def experts_apart(self) -> int:
        """Over how many ranks whole experts are spread."""
        return self.expert or 1

    def layers_of(self, shape: ModelShape, stage: int) -> tuple[int, int]:
        """Return first and end of a pipeline stage's layers; the first stages have one more if they do not divide."""
        each, more = divmod(shape.layers, self.pipeline)
        return stage * each + min(stage, more), (stage + 1) * each + min(stage + 1, more)

    def weight_bytes(self, shape: ModelShape, precisions: Precisions, stage: int = 0) -> WeightBytes:
        """Return what each rank of a pipeline stage holds of the weights.

        What cannot be cut is on every tensor rank: routers, norms, biases, latent attention's down-projections, and a
        key-value head where there are more ranks than heads.
        """
        first, end = self.layers_of(shape, stage)
        layers, moe = end - first, shape.moe_layers_before(end) - shape.moe_layers_before(first)
        weight = BYTES_PER_WEIGHT[precisions.weights]
        whole = 1 if self.attention_dp else self.tensor
        head = shape.head_weights * _HALF / whole
        is_first, is_last = stage == 0, stage == self.pipeline - 1
        shared_copy = shape.tied_embeddings and is_first and is_last
        return WeightBytes(
            attention=layers * self._attention_weights(shape) * BYTES_PER_WEIGHT[precisions.of_attention],
            dense=(layers - moe) * shape.dense_weights * weight / self.tensor,
            experts=moe * shape.experts * shape.expert_weights * weight / self.tensor,
            shared=moe * shape.shared_weights * weight / whole,
            router=moe * shape.router_weights * _HALF,
            embedding=head if is_first else 0.0,
            head=head if is_last and not shared_copy else 0.0,
            vectors=shape.vector_weights * _HALF * layers / shape.layers,
        )

    def kv_copies(self, shape: ModelShape) -> float:
        """Return how often each number of the keys and values is held by the tensor ranks, together."""
        if self.attention_dp:
            return 1.0
        if shape.latent is not None:
            return float(self.tensor)
        return math.ceil(shape.kv_heads / self.tensor) * self.tensor / shape.kv_heads

    def kv_bytes_per_token(self, shape: ModelShape, precision: Precision, stage: int = 0) -> float:
        """Return what each rank of a stage holds of a token's keys and values, within all windows.

        With attention data parallelism: the rank whose sequence it is.
        """
        first, end = self.layers_of(shape, stage)
        return (end - first) / shape.layers * shape.kv_bytes_per_token(precision) * self._kv_share(shape)

    def kv_bytes(self, shape: ModelShape, precision: Precision, tokens: int, stage: int = 0) -> float:
        """Return what each rank of a stage holds of a sequence's keys and values, of which windows keep the last."""
        first, end = self.layers_of(shape, stage)
        windowed = shape.windowed_layers_before(end) - shape.windowed_layers_before(first)
        kept = (end - first - windowed) * tokens + windowed * min(tokens, shape.window_tokens or tokens)
        return kept * shape.kv_numbers * BYTES_PER_WEIGHT[precision] * self._kv_share(shape)

    def _kv_share(self, shape: ModelShape) -> float:
        return 1.0 if self.attention_dp else self.kv_copies(shape) / self.tensor

    def _attention_weights(self, shape: ModelShape) -> float:
        """Return a rank's weights of one layer's attention."""
        if self.attention_dp or self.tensor == 1:
            return float(shape.attention_weights)
        if shape.latent is not None:
            down = shape.hidden * (shape.latent.kv_rank + shape.latent.rope_dim + (shape.latent.query_rank or 0))
            return down + (shape.attention_weights - down) / self.tensor
        keys_and_values = shape.hidden * shape.kv_numbers
        return (shape.attention_weights - keys_and_values) / self.tensor + keys_and_values * self._kv_share(shape)
