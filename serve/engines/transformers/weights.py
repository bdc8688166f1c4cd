"""From a checkpoint's files to a model of the library on the CPU: whole, a shard of it, or with weights in 8 bits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from serve.engines.transformers.collectives import TensorGroup
from serve.engines.transformers.quantized import Int8Weights
from serve.engines.transformers.sharding import Plan, Shard, make_plan, read_shard, sharded_class
from serve.errors import ConfigError


@dataclass(frozen=True)
class WeightSource:
    """What is loaded.

    Attributes:
        model_dir: The checkpoint.
        config: The library's configuration of it.
        plan: How it is split; None: the library reads the files by itself.
        group: Whose rank's part is loaded; None: all of it.
        is_int8: Whether its weights are in 8 bits.
    """

    model_dir: Path
    config: Any
    plan: Plan | None
    group: TensorGroup | None
    is_int8: bool


def plan_shards(config: Any, model_dir: Path, group: TensorGroup | None) -> Plan:
    """Find out how a model's weights are split over the ranks of a group; without one, they are not.

    Raises:
        ConfigError: They cannot be.
    """
    if getattr(config, "quantization_config", None) is not None:
        world_size = 1 if group is None else group.world_size
        raise ConfigError(
            f"parallel.tensor: the checkpoint in {model_dir} is quantized, which is not split over "
            f"tensor={world_size} ranks; use a 16-bit checkpoint, or tensor: 1, or the trtllm engine"
        )
    try:
        with torch.device("meta"):
            whole = transformers.AutoModelForCausalLM.from_config(config)
    except Exception as exc:  # the library raises whatever its models raise
        raise ConfigError(f"model: {model_dir / 'config.json'} describes no model that can be made: {exc}") from exc
    return make_plan(whole, config.get_text_config(), 1 if group is None else group.world_size)


def load_weights(source: WeightSource, dtype: torch.dtype, attention: list[str]) -> Any:
    """Load with the first kind of attention that the model has.

    Raises:
        ConfigError: The library cannot, memory does not suffice, or the files do not fit config.json.
    """
    first, *others = attention
    kept = {"dtype": dtype, "attn_implementation": first, "output_loading_info": True}
    try:
        if source.plan is not None:
            model, report = _load_tensors(source, source.plan, kept)
        else:
            auto = transformers.AutoModelForCausalLM
            model, report = auto.from_pretrained(source.model_dir, local_files_only=True, **kept)
    except ConfigError:
        raise
    except torch.OutOfMemoryError as exc:
        raise ConfigError(
            f"model: the weights of {source.model_dir} do not fit the memory of the device: {exc}"
        ) from exc
    except Exception as exc:  # the library raises whatever its parsers raise
        if others and "does not support an attention implementation" in str(exc):
            return load_weights(source, dtype, others)
        raise ConfigError(f"model: the weights in {source.model_dir} cannot be loaded: {exc}") from exc
    # The library makes up random numbers for weights that are not there.
    for what in ("missing_keys", "mismatched_keys"):
        names = sorted(str(name) for name in report.get(what) or ())
        if names:
            raise ConfigError(
                f"model: the checkpoint in {source.model_dir} does not fit its config.json; "
                f"{what.replace('_', ' ')}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
            )
    return model


def _load_tensors(source: WeightSource, plan: Plan, kept: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Load what this rank has of each weight, and nothing else."""
    shard = Shard(0, 1) if source.group is None else Shard(source.group.rank, source.group.world_size)
    tensors = read_shard(source.model_dir, plan, shard)
    model_class = sharded_class(plan, shard)
    weights = Int8Weights(tensors, plan.linears, plan.prefix, kept["dtype"]) if source.is_int8 else None
    if weights is not None:
        model_class = weights.model_class(model_class)
    model, report = model_class.from_pretrained(None, config=source.config, state_dict=tensors, **kept)
    if weights is not None:
        weights.fill(model)
    return model, report
