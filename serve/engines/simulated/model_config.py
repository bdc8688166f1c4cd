"""shape_from_config: a model's shape from its config.json, or a refusal: a wrong guess would be worse than none."""

from collections.abc import Mapping
from typing import Any

from serve.engines.simulated.model_families import FAMILIES, Family, Flag
from serve.engines.simulated.model_shape import LatentAttention, ModelShape

# Where models of text and pictures keep the part that generates text.
_TEXT_PARTS = ("text_config", "llm_config", "language_config")
_FULL = frozenset({"full_attention"})
_SLIDING = frozenset({"sliding_attention"})
_WINDOWED = _SLIDING | {"chunked_attention"}


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part that describes the decoder, the whole if there are no parts."""
    for name in _TEXT_PARTS:
        if isinstance(config.get(name), Mapping):
            inherited = {key: config[key] for key in ("tie_word_embeddings", "quantization_config") if key in config}
            return {**inherited, **config[name]}
    return dict(config)


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """Return the shape of the decoder.

    Args:
        config: The parsed config.json.

    Raises:
        ValueError: The model type is unknown, or something in it is not understood; says what.
        pydantic.ValidationError: A number is missing or wrong.
    """
    text = text_config(config)
    kind = text.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"model_type {kind!r} is none of those that are understood: {', '.join(sorted(FAMILIES))}")
    return _Reader(kind, FAMILIES[kind], text).shape()


class _Reader:
    """Reads one config by its family's rules."""

    def __init__(self, kind: str, family: Family, config: Mapping[str, Any]) -> None:
        self._kind, self._family, self._config = kind, family, config

    def shape(self) -> ModelShape:
        self._check()
        fields = self._attention() | self._network() | self._windows()
        fields |= {
            "layers": self._get("num_hidden_layers"),
            "hidden": self._get("hidden_size"),
            "vocab": self._get("vocab_size"),
            "tied_embeddings": bool(self._get("tie_word_embeddings", True)),
        }
        if context := self._get("max_position_embeddings"):
            fields["context_tokens"] = context
        shape = ModelShape.model_validate(fields)
        return shape.model_copy(update={"vector_weights": self._vectors(shape)})

    def _get(self, key: str, default: Any = None) -> Any:
        """Return a value by Llama's name."""
        for name in dict.fromkeys((self._family.keys.get(key, key), key)):
            if self._config.get(name) is not None:
                return self._config[name]
        return self._family.defaults.get(key, default)

    def _flag(self, flag: Flag) -> bool:
        return flag if isinstance(flag, bool) else bool(self._get(flag, False))

    def _check(self) -> None:
        """Refuse what is beyond the rules of the family."""
        for key, value in self._family.refused.items():
            found = self._get(key, value)
            if found != value:
                raise ValueError(f"{key}={found!r} of {self._kind} is not understood; only {value!r} is")
        for layer_type in set(self._get("layer_types", ())) - _FULL - _WINDOWED:
            raise ValueError(f"layer_types: {layer_type!r} is not understood; only attention is")
        narrow = self._get("word_embed_proj_dim")
        if narrow not in (None, self._get("hidden_size")):
            raise ValueError(f"word_embed_proj_dim={narrow} other than hidden_size is not understood")

    # Attention

    def _attention(self) -> dict[str, Any]:
        heads, hidden = self._get("num_attention_heads"), self._get("hidden_size")
        if self._config.get("kv_lora_rank"):
            rope = self._get("qk_rope_head_dim")
            return {
                "heads": heads,
                "kv_heads": heads,
                "head_dim": self._get("qk_nope_head_dim", 0) + rope,
                "value_dim": self._get("v_head_dim"),
                "latent": LatentAttention(
                    kv_rank=self._get("kv_lora_rank"), rope_dim=rope, query_rank=self._get("q_lora_rank")
                ),
            }
        whole = isinstance(heads, int) and isinstance(hidden, int) and heads > 0
        return {
            "heads": heads,
            "kv_heads": self._kv_heads(heads),
            "head_dim": self._get("head_dim") or (hidden // heads if whole else None),
        }

    def _kv_heads(self, heads: Any) -> Any:
        if self._kind == "falcon" and not self._get("new_decoder_architecture", False):
            return 1 if self._get("multi_query", True) else heads
        return self._get("num_key_value_heads") or heads

    def _windows(self) -> dict[str, Any]:
        layers, window = self._get("num_hidden_layers"), self._get("sliding_window")
        context = self._get("max_position_embeddings")
        if not isinstance(layers, int) or not window or (context is not None and window >= context):
            return {}
        windowed = self._windowed_layers(layers)
        if not windowed:
            return {}
        return {"window_tokens": window, "windowed_layers": windowed, "window_period": self._window_period()}

    def _window_period(self) -> int | None:
        """Return after how many layers the windows repeat, if they do so exactly, and slide."""
        types = self._get("layer_types")
        if types:
            period = next((i + 1 for i, layer_type in enumerate(types) if layer_type in _FULL), None)
            expected = [_FULL if period and (i + 1) % period == 0 else _SLIDING for i in range(len(types))]
            same = all(layer_type in kinds for layer_type, kinds in zip(types, expected, strict=True))
            return period if same else None
        if self._family.windows == "alternate":
            return 2
        return int(self._get("sliding_window_pattern")) if self._family.windows == "pattern" else None

    def _windowed_layers(self, layers: int) -> int:
        if types := self._get("layer_types"):
            return sum(layer_type in _WINDOWED for layer_type in types)
        match self._family.windows:
            case "all":
                return layers
            case "from_layer":
                used = self._get("use_sliding_window", False)
                return max(0, layers - int(self._get("max_window_layers"))) if used else 0
            case "alternate":
                return (layers + 1) // 2  # the first one has it
            case "pattern":
                return layers - layers // int(self._get("sliding_window_pattern"))
            case "chunks":
                rotary = self._get("no_rope_layers")  # 1: positions are rotated, and the layer sees its chunk only
                return sum(rotary) if rotary else layers - layers // int(self._get("no_rope_layer_interval", 4))
            case _:
                return 0

    # Feed-forward networks

    def _network(self) -> dict[str, Any]:
        width = self._get("intermediate_size") or self._default_width()
        fields: dict[str, Any] = {"intermediate": width, "gated": self._family.gated}
        experts = self._get("n_routed_experts") or self._get("num_local_experts") or self._get("num_experts") or 0
        if self._family.experts == "none" or not experts:
            return fields
        expert_width = self._get("moe_intermediate_size") or width
        fields |= {
            "experts": experts,
            "experts_per_token": self._get("num_experts_per_tok"),
            "intermediate": expert_width,
            "shared_intermediate": self._shared_width(expert_width),
        }
        if self._family.experts == "after_dense" and (dense := self._get("first_k_dense_replace", 0)):
            fields |= {"dense_layers": dense, "dense_intermediate": width}
        if self._family.experts == "interleaved":
            fields |= self._interleaved()
        return fields

    def _default_width(self) -> Any:
        hidden = self._get("hidden_size")
        wide = self._kind in ("gpt2", "gptj", "falcon") and isinstance(hidden, int)
        return 4 * hidden if wide else None

    def _shared_width(self, expert_width: int) -> int:
        if self._family.experts == "interleaved":
            return expert_width
        if self._family.shared_gate:
            return int(self._get("shared_expert_intermediate_size", 0))
        return int(self._get("n_shared_experts") or 0) * expert_width

    def _interleaved(self) -> dict[str, Any]:
        layers = int(self._get("num_hidden_layers"))
        sparse = self._get("moe_layers")
        count = len(sparse) if sparse else layers // int(self._get("interleave_moe_layer_step"))
        if count == layers:
            return {}
        return {
            "dense_layers": layers - count,
            "dense_layers_first": False,
            "dense_intermediate": self._get("intermediate_size_mlp"),
        }

    # Everything else

    def _vectors(self, shape: ModelShape) -> int:
        """Count norms, biases, gates and positions."""
        family = self._family
        norm = shape.hidden * (2 if family.norm_bias else 1)
        count = norm + shape.layers * (self._norms() * norm + self._attention_vectors(shape))
        count += shape.vocab if self._flag(family.head_bias) else 0
        if family.positions is not None:
            count += (shape.context_tokens + family.positions) * shape.hidden
        if self._flag(family.mlp_bias):
            wide = shape.intermediate * (2 if family.gated else 1)
            count += (shape.layers - shape.moe_layers) * (wide + shape.hidden)
        per_moe_layer = shape.hidden if family.shared_gate else 0
        per_moe_layer += shape.experts if family.router_bias else 0
        if family.expert_bias:
            per_moe_layer += shape.experts * (2 * shape.intermediate + shape.hidden + 1)
        return count + shape.moe_layers * per_moe_layer

    def _norms(self) -> int:
        if self._kind == "falcon":  # one before attention and network together, or one before each
            if self._get("new_decoder_architecture", False):
                return int(self._get("num_ln_in_parallel_attn") or 2)
            return 1 if self._get("parallel_attn", True) else 2
        return self._family.norms

    def _attention_vectors(self, shape: ModelShape) -> int:
        family, queries = self._family, shape.heads * shape.head_dim
        keys = shape.kv_heads * shape.head_dim
        count = shape.heads if family.sinks else 0
        count += shape.hidden if self._flag(family.output_bias) else 0
        if shape.latent is not None:
            compressed = shape.latent.query_rank or 0
            count += compressed + shape.latent.kv_rank  # their norms
            if self._flag(family.qkv_bias):
                count += compressed + shape.latent.kv_rank + shape.latent.rope_dim
            return count
        count += queries + 2 * keys if self._flag(family.qkv_bias) else 0
        if family.qk_norm != "none" and self._flag(family.qk_norm_if):
            count += 2 * shape.head_dim if family.qk_norm == "head" else queries + keys
        return count
