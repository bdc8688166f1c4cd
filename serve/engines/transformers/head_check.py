"""Whether the heads of a model's attention can be shared by its ranks, told by its config.json, without torch."""

import json
from pathlib import Path
from typing import Any

from serve.errors import ConfigError

_HEADS = ("num_attention_heads", "num_key_value_heads")


def check_heads(model_dir: Path, tensor: int, setting: str = "parallel.tensor") -> None:
    """Check that each rank gets as many heads; what cannot be told here, the engine checks when it loads the model.

    Args:
        model_dir: A Hugging Face checkpoint.
        tensor: Ranks.
        setting: What asks for so many, for the message.

    Raises:
        ConfigError: The heads do not divide; names the numbers.
    """
    if tensor == 1:
        return
    try:
        config = json.loads((model_dir / "config.json").read_text())
    except (OSError, ValueError):
        return  # its absence has a message of its own
    text = config.get("text_config", config) if isinstance(config, dict) else {}
    heads = {name: text.get(name) for name in _HEADS if isinstance(text, dict)}
    uneven = [f"{name}={count}" for name, count in heads.items() if isinstance(count, int) and count % tensor]
    if uneven and _splits_heads(config.get("model_type"), text.get("model_type")):
        raise ConfigError(
            f"{setting}: a model of type {config.get('model_type')!r} cannot be split over tensor={tensor} ranks: "
            f"{', '.join(uneven)}; use a number that divides it, or tensor: 1, or the trtllm engine"
        )


def _splits_heads(*model_types: Any) -> bool:
    """Return whether the library's plan for such models shares the heads; some give each rank all of them."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # slow to import, and rarely needed

    for model_type in model_types:
        if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
            plan = getattr(CONFIG_MAPPING[model_type], "base_model_tp_plan", None) or {}
            if any(name.endswith("k_proj") and style == "colwise" for name, style in plan.items()):
                return True
    return False
