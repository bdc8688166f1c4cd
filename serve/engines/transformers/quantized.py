"""Quantized checkpoints: which this engine loads, and how its 8-bit weights get into a model of the library.

The layout is that of ModelOpt's unified checkpoints with `quant_algo` W8A16: hf_quant_config.json, and for each
quantized layer `weight`, int8 (outputs, inputs), and `weight_scale`, float32 (outputs,).
"""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from serve.engines.transformers.int8_linear import Int8Linear, Scratch
from serve.errors import ConfigError

_log = logging.getLogger(__name__)

_FILE = "hf_quant_config.json"
_ALGORITHM = "W8A16"
_WEIGHT, _SCALE = ".weight", ".weight_scale"


def has_int8_weights(model_dir: Path, config: Any) -> bool:
    """Whether a checkpoint's weights are in 8 bits, as this engine computes with them.

    Args:
        model_dir: The checkpoint.
        config: The library's configuration of it; of checkpoints that others quantized, the library knows what to do.

    Raises:
        ConfigError: ModelOpt quantized it in a way that needs TensorRT-LLM.
    """
    details = _details(model_dir, config)
    if details is None:
        return False
    algorithm, kv_algorithm = details.get("quant_algo"), details.get("kv_cache_quant_algo")
    if algorithm != _ALGORITHM or kv_algorithm is not None:
        what = f"{algorithm}, KV cache {kv_algorithm}" if kv_algorithm else str(algorithm)
        raise ConfigError(
            f"model: {model_dir} is quantized by ModelOpt ({what}), which the transformers engine cannot compute with; "
            "use engine: trtllm, or build a bundle for this engine with quantize: int8_weight_only, or none"
        )
    return True


def _details(model_dir: Path, config: Any) -> Mapping[str, Any] | None:
    """Return what ModelOpt says of the weights; None: it has not quantized them."""
    path = model_dir / _FILE
    if path.is_file():
        try:
            details = json.loads(path.read_bytes())["quantization"]
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise ConfigError(
                f"model: {path} cannot be read ({exc!r}); build or download the checkpoint again"
            ) from exc
    else:
        details = getattr(config, "quantization_config", None)
        details = details if isinstance(details, Mapping) and details.get("quant_method") == "modelopt" else None
    return details if isinstance(details, Mapping) else None


class Int8Weights:
    """The 8-bit weights of a checkpoint, or of one shard of it.

    Args:
        tensors: All tensors of the checkpoint. Those of `linears` that are in 8 bits are taken out; others, as those of
            experts, which the library joins, are made whole.
        linears: Names of the model's linear layers.
        prefix: What the names of a checkpoint may lack.
        dtype: Of the model.

    Raises:
        ConfigError: There are no such weights, or they have no scales.
    """

    def __init__(
        self, tensors: dict[str, torch.Tensor], linears: frozenset[str], prefix: str, dtype: torch.dtype
    ) -> None:
        self._weights: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        made_whole = 0
        for name in [name for name, tensor in tensors.items() if tensor.dtype is torch.int8]:
            layer = name.removesuffix(_WEIGHT)
            scale = tensors.pop(layer + _SCALE, None)
            weight = tensors.pop(name)
            if scale is None or scale.shape != weight.shape[:1]:
                raise ConfigError(f"model: {name} is in 8 bits and has no scale for each row; build the bundle again")
            known = next((found for found in (layer, prefix + layer) if found in linears), None)
            if known is None:
                tensors[name] = (weight.float() * scale[:, None]).to(dtype)
                made_whole += 1
            else:
                self._weights[known] = (weight, scale)
        if not self._weights and not made_whole:
            raise ConfigError(f"model: {_FILE} says {_ALGORITHM}, but no weight is in 8 bits; build the bundle again")
        if made_whole:
            _log.warning("%d weights of experts are kept in %s: only linear layers stay in 8 bits", made_whole, dtype)

    def model_class(self, base: Any) -> Any:
        """Return a class of models like `base`, with room for these weights in the place of linear layers."""
        layers = tuple(self._weights)

        def build(self: Any, config: Any, *arguments: Any, **named: Any) -> None:
            base.__init__(self, config, *arguments, **named)
            scratch = Scratch()
            for name in layers:
                self.set_submodule(name, Int8Linear(self.get_submodule(name), scratch))

        # The library finds out by a class's module and name what its source can do.
        names = {"__init__": build, "__module__": base.__module__, "__qualname__": base.__qualname__}
        return type(base.__name__, (base,), names)

    def fill(self, model: Any) -> None:
        """Put the weights into a loaded model of that class."""
        for name, (weight, scale) in self._weights.items():
            layer = model.get_submodule(name)
            if weight.shape != (layer.out_features, layer.in_features):
                raise ConfigError(
                    f"model: {name}.weight has the shape {tuple(weight.shape)}, which does not fit config.json"
                )
            layer.fill(weight, scale)
        self._weights.clear()


def product_of(layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what multiplies with a linear layer's weight, and leaves its bias out."""
    if isinstance(layer, Int8Linear):
        return layer.multiply
    assert isinstance(layer, nn.Linear)
    return lambda hidden: nn.functional.linear(hidden, layer.weight)


def count_weights(model: nn.Module) -> int:
    """Return how many weights a model has, those in 8 bits among them."""
    small = (layer.weight.numel() for layer in model.modules() if isinstance(layer, Int8Linear))
    return sum(parameter.numel() for parameter in model.parameters()) + sum(small)
