"""ModelShape: a decoder-only transformer as far as its memory and its speed depend on it; counts of its weights."""

from typing import Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from serve.core.strict_model import StrictModel
from serve.engines.simulated.hardware import BYTES_PER_WEIGHT, Precision


class LatentAttention(StrictModel):
    """Multi-head latent attention: keys and values of all heads are kept as one small vector.

    Source: DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1.
    """

    kv_rank: PositiveInt = Field(description="`kv_lora_rank`.")
    rope_dim: PositiveInt = Field(description="`qk_rope_head_dim`.")
    query_rank: PositiveInt | None = Field(default=None, description="`q_lora_rank`; None: queries are not compressed.")


class ModelShape(StrictModel):
    """A decoder-only transformer: grouped-query or latent attention, feed-forward layers dense or of experts."""

    layers: PositiveInt = Field(description="`num_hidden_layers`.")
    hidden: PositiveInt = Field(description="`hidden_size`.")
    heads: PositiveInt = Field(description="`num_attention_heads`.")
    kv_heads: PositiveInt = Field(description="`num_key_value_heads`.")
    head_dim: PositiveInt = Field(
        description="`head_dim`, or hidden_size / num_attention_heads; of latent attention the sum of both parts."
    )
    value_dim: PositiveInt | None = Field(default=None, description="`v_head_dim`; None: as `head_dim`.")
    latent: LatentAttention | None = Field(default=None, description="None: keys and values are kept as they are.")
    window_tokens: PositiveInt | None = Field(default=None, description="`sliding_window`; None: no layer has one.")
    windowed_layers: NonNegativeInt = Field(default=0, description="Layers that see no further than the window.")
    window_period: PositiveInt | None = Field(
        default=None, description="Every so many-th layer has no window, all others do; None: it is not so."
    )
    intermediate: PositiveInt = Field(description="`intermediate_size`; of one expert in an MoE model.")
    gated: bool = Field(default=True, description="Three matrices in a feed-forward network; else two.")
    experts: NonNegativeInt = Field(default=0, description="Routed experts a layer; 0: dense.")
    experts_per_token: NonNegativeInt = Field(default=0, description="Experts that each token visits.")
    shared_intermediate: NonNegativeInt = Field(
        default=0, description="Of an MoE layer: width of the network that every token visits besides its experts."
    )
    dense_layers: NonNegativeInt = Field(default=0, description="Of an MoE model: layers without experts.")
    dense_layers_first: bool = Field(default=True, description="These come first; else they are spread evenly.")
    dense_intermediate: PositiveInt | None = Field(default=None, description="Of these layers; None: as of an expert.")
    vocab: PositiveInt = Field(description="`vocab_size`.")
    tied_embeddings: bool = Field(default=False, description="`tie_word_embeddings`: input and output share them.")
    vector_weights: NonNegativeInt = Field(
        default=0, description="Weights that are no matrices of the above: norms, biases, learned positions, gates."
    )
    context_tokens: PositiveInt = Field(default=131072, description="`max_position_embeddings`.")

    @model_validator(mode="after")
    def _parts_fit_the_whole(self) -> Self:
        for name, part, whole in (
            ("windowed_layers", self.windowed_layers, self.layers),
            ("dense_layers", self.dense_layers, self.layers),
            ("experts_per_token", self.experts_per_token, self.experts),
        ):
            if part > whole:
                raise ValueError(f"{name}={part} exceeds {whole}; lower it")
        if bool(self.windowed_layers) != (self.window_tokens is not None):
            raise ValueError(
                f"window_tokens={self.window_tokens} and windowed_layers={self.windowed_layers} go together: give "
                "both, or neither"
            )
        if bool(self.experts) != bool(self.experts_per_token):
            raise ValueError(
                f"experts={self.experts} and experts_per_token={self.experts_per_token} go together: give both, or "
                "neither"
            )
        if self.latent is not None and self.latent.rope_dim >= self.head_dim:
            raise ValueError(f"head_dim={self.head_dim} has to exceed latent.rope_dim={self.latent.rope_dim}; raise it")
        return self

    def divides_over(self, tensor: int) -> bool:
        """Return whether so many ranks can share the heads: each has as many, or a copy of a key-value head."""
        fits_keys = self.latent is not None or self.kv_heads % tensor == 0 or tensor % self.kv_heads == 0
        return self.heads % tensor == 0 and fits_keys

    # Weights

    @property
    def values(self) -> int:
        """Size of one head's value."""
        return self.value_dim or self.head_dim

    @property
    def attention_weights(self) -> int:
        """Weights of a layer's projections."""
        output = self.heads * self.values * self.hidden
        queries = self.heads * self.head_dim
        if self.latent is None:
            return self.hidden * (queries + self.kv_heads * (self.head_dim + self.values)) + output
        latent = self.latent
        plain = self.head_dim - latent.rope_dim
        rank = latent.query_rank
        to_queries = self.hidden * queries if rank is None else (self.hidden + queries) * rank
        to_latent = self.hidden * (latent.kv_rank + latent.rope_dim)
        return to_queries + to_latent + latent.kv_rank * self.heads * (plain + self.values) + output

    @property
    def expert_weights(self) -> int:
        """Weights of a layer's feed-forward network, or of one of its experts."""
        return self._network(self.intermediate)

    @property
    def shared_weights(self) -> int:
        """Weights of an MoE layer's network that every token visits."""
        return self._network(self.shared_intermediate)

    @property
    def dense_weights(self) -> int:
        """Weights of the feed-forward network of a layer without experts."""
        return self._network(self.dense_intermediate or self.intermediate)

    @property
    def router_weights(self) -> int:
        """Weights of an MoE layer's router, which is never quantized."""
        return self.hidden * self.experts

    @property
    def moe_layers(self) -> int:
        """Layers with experts."""
        return self.layers - self.dense_layers if self.experts else 0

    @property
    def weights(self) -> int:
        """Weights of all layers' matrices, without embeddings."""
        expert_layer = self.experts * self.expert_weights + self.shared_weights + self.router_weights
        dense = self.layers - self.moe_layers
        return self.layers * self.attention_weights + dense * self.dense_weights + self.moe_layers * expert_layer

    @property
    def head_weights(self) -> int:
        """Weights of the output projection, which is kept in 16 bits."""
        return self.hidden * self.vocab

    @property
    def embedding_weights(self) -> int:
        """Weights of embeddings and output projection."""
        return self.head_weights * (1 if self.tied_embeddings else 2)

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.weights + self.embedding_weights + self.vector_weights

    @property
    def active_parameters(self) -> int:
        """Weights that one token makes use of, embeddings included."""
        idle = self.moe_layers * (self.experts - self.experts_per_token) * self.expert_weights
        return self.parameters - idle

    def _network(self, intermediate: int) -> int:
        return (3 if self.gated else 2) * self.hidden * intermediate

    # Layers of one pipeline stage

    def moe_layers_before(self, layer: int) -> int:
        """Return how many of the first `layer` layers have experts."""
        if self.dense_layers_first:
            return max(0, layer - self.dense_layers) if self.experts else 0
        return layer * self.moe_layers // self.layers

    def windowed_layers_before(self, layer: int) -> int:
        """Return how many of the first `layer` layers have a window."""
        return layer * self.windowed_layers // self.layers

    # Keys and values

    def window_pattern(self, context_tokens: int) -> tuple[int, ...] | None:
        """Return the windows of the first layers, which repeat; None: they do not, or there are none."""
        if self.window_tokens is None:
            return None
        if self.windowed_layers == self.layers:
            return (self.window_tokens,)
        if self.window_period is None:
            return None
        return (*[self.window_tokens] * (self.window_period - 1), context_tokens)

    @property
    def kv_numbers(self) -> int:
        """Numbers that a layer keeps of each token."""
        if self.latent is not None:
            return self.latent.kv_rank + self.latent.rope_dim
        return self.kv_heads * (self.head_dim + self.values)

    def kv_bytes_per_token(self, kv_precision: Precision) -> float:
        """Return the size of one token's keys and values, as long as it is within all windows."""
        return self.layers * self.kv_numbers * BYTES_PER_WEIGHT[kv_precision]

    def kv_bytes(self, tokens: int, kv_precision: Precision) -> float:
        """Return the size of the keys and values of a sequence, of which windows keep only the last tokens."""
        full = self.layers - self.windowed_layers
        kept = full * tokens + self.windowed_layers * min(tokens, self.window_tokens or tokens)
        return kept * self.kv_numbers * BYTES_PER_WEIGHT[kv_precision]
