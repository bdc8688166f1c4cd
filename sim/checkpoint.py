"""read_checkpoint: a model's shape and precision, from the config.json of its Hugging Face checkpoint."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from serve.core.strict_model import describe_mistakes
from serve.engines.simulated.hardware import MODELS, ModelShape, Precision
from serve.errors import ConfigError

_REMEDY = f"describe the model by --model instead, one of {', '.join(MODELS)}"


def read_checkpoint(directory: Path) -> tuple[ModelShape, Precision]:
    """Read what the latency model needs.

    Raises:
        ConfigError: There is no config.json, or it is not that of a decoder-only transformer.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}; {_REMEDY}") from None
    except ValueError as exc:
        raise ConfigError(f"{path} is no JSON: {exc}; {_REMEDY}") from None
    text = config.get("text_config", config) if isinstance(config, dict) else {}
    try:
        return _shape(text), _precision(config)
    except ValidationError as exc:
        raise ConfigError(describe_mistakes(exc, f"{path}: ") + f"\n{_REMEDY}") from None


def _shape(config: dict[str, Any]) -> ModelShape:
    heads = config.get("num_attention_heads")
    experts = config.get("num_local_experts") or config.get("num_experts") or 0
    fields = {
        "layers": config.get("num_hidden_layers"),
        "hidden": config.get("hidden_size"),
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or (config.get("hidden_size") or 0) // (heads or 1),
        "intermediate": (config.get("moe_intermediate_size") if experts else None) or config.get("intermediate_size"),
        "vocab": config.get("vocab_size"),
        "experts": experts,
        "experts_per_token": config.get("num_experts_per_tok") or 0 if experts else 0,
    }
    if config.get("max_position_embeddings"):
        fields["context_tokens"] = config["max_position_embeddings"]
    return ModelShape.model_validate(fields)


def _precision(config: dict[str, Any]) -> Precision:
    quantization = json.dumps(config.get("quantization_config") or {}).lower()
    if "fp4" in quantization:
        return "fp4"
    return "fp8" if "fp8" in quantization or "float8" in quantization else "bf16"
