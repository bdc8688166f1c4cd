"""Sharding: the part of a model that one tensor-parallel rank has, and its exchange with the others.

What is split, and how, is the model's own `tp_plan`, which the library keeps for nearly all its models. The library's
way to carry it out changed in nearly every release from 5.17 to 5.23, and needs the process's default process group,
of which there is one for all engines. So it is done here: the modules of the plan are made small, the checkpoint is
read in slices, and their forward passes exchange what the plan says.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from torch import nn

from serve.engines.transformers.collectives import TensorGroup
from serve.engines.transformers.quantized import product_of
from serve.errors import ConfigError

_COLUMNS = ("colwise", "colwise_gather_output", "colwise_rep")
_ROWS = ("rowwise", "rowwise_split_input", "rowwise_rep")
_GATHERED = ("colwise_gather_output", "colwise_rep")
_SPLIT_INPUT = ("rowwise_split_input", "rowwise_rep")
_WHOLE = ("replicate", "replicated_with_grad_allreduce", "embedding_rowwise", "embedding_colwise")
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Shard:
    """Which part of a model: `index` of `count` equal ones."""

    index: int
    count: int

    def bounds(self, size: int) -> tuple[int, int]:
        """Return where this part of `size` rows begins and ends; the last parts may be shorter, or empty."""
        part = -(-size // self.count)
        return min(self.index * part, size), min((self.index + 1) * part, size)


@dataclass(frozen=True)
class Plan:
    """How each weight of a model is split.

    Attributes:
        styles: The library's word for each linear layer that is split, by the layer's name.
        splits_heads: Whether each rank has a part of the heads of the attention, and of the KV cache.
        model_class: The library's.
        prefix: What the names of a checkpoint may lack.
        linears: Names of all linear layers.
    """

    styles: dict[str, str]
    splits_heads: bool
    model_class: Any
    prefix: str
    linears: frozenset[str]

    def axis(self, tensor: str) -> int | None:
        """Return the dimension along which a tensor of the checkpoint is split; None if each rank has all of it.

        Scales of a quantized weight, of which there is one for each output, are split like a bias.
        """
        layer, _, kind = tensor.rpartition(".")
        style = self.styles.get(layer) or self.styles.get(self.prefix + layer)
        if style in _COLUMNS:
            return 0
        return 1 if style in _ROWS and kind == "weight" else None


def make_plan(model: Any, config: Any, count: int) -> Plan:
    """Read a model's plan, and check that its parts are equal.

    Args:
        model: The library's; on the meta device will do.
        config: Of the text model.
        count: Ranks.

    Raises:
        ConfigError: The model has no plan, or one that cannot be carried out with so many ranks.
    """
    kind = config.model_type
    linears = _linears(model)
    if count == 1:
        return Plan({}, False, type(model), f"{model.base_model_prefix}.", frozenset(linears))
    patterns = dict(getattr(model, "tp_plan", None) or {})
    output = model.get_output_embeddings()
    styles: dict[str, str] = {}
    for pattern, style in patterns.items():
        if style in _WHOLE:
            continue
        names = [name for name in linears if re.sub(r"\.\d+(?=\.|$)", ".*", name) == pattern]
        if names and style in _COLUMNS + _ROWS:
            styles.update({name: style for name in names if linears[name] is not output})
        elif names or _has_parameters(model, pattern):
            _refuse(kind, count, f"{pattern} would have to be split as {style!r}, which this engine does not do")
    if not any(style in _ROWS for style in styles.values()):
        _refuse(kind, count, f"transformers has no tensor-parallel plan for it (tp_plan: {patterns or 'none'})")
    for name, style in styles.items():
        size = linears[name].out_features if style in _COLUMNS else linears[name].in_features
        if size % count:
            _refuse(kind, count, f"{name} has {size} {'outputs' if style in _COLUMNS else 'inputs'}")
    splits_heads = any(name.endswith("k_proj") and style == "colwise" for name, style in styles.items())
    if splits_heads:
        for field in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(config, field, None)
            if heads is not None and heads % count:
                _refuse(kind, count, f"{field}={heads}")
    return Plan(styles, splits_heads, type(model), f"{model.base_model_prefix}.", frozenset(linears))


def _linears(model: Any) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _has_parameters(model: Any, pattern: str) -> bool:
    names = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name, _ in model.named_parameters()}
    return any(name == pattern or name.startswith(f"{pattern}.") for name in names)


def _refuse(kind: str, count: int, why: str) -> NoReturn:
    raise ConfigError(
        f"parallel.tensor: a model of type {kind!r} cannot be split over tensor={count} ranks: {why}; use a number "
        "that divides it, or tensor: 1, or the trtllm engine"
    )


def sharded_class(plan: Plan, shard: Shard) -> Any:
    """Return a class of models like the plan's, whose split layers have the shapes of one shard."""
    model_class = plan.model_class

    def build(self: Any, config: Any, *arguments: Any, **named: Any) -> None:
        model_class.__init__(self, config, *arguments, **named)
        for name in plan.styles:
            _shrink(self.get_submodule(name), plan, name, shard)

    # The library finds out by a class's module and name what its source can do.
    names = {"__init__": build, "__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    return type(model_class.__name__, (model_class,), names)


def _shrink(layer: nn.Linear, plan: Plan, name: str, shard: Shard) -> None:
    for kind, parameter in list(layer.named_parameters(recurse=False)):
        axis = plan.axis(f"{name}.{kind}")
        if axis is not None:
            start, stop = shard.bounds(parameter.shape[axis])
            small = parameter.data.narrow(axis, start, stop - start)
            setattr(layer, kind, nn.Parameter(torch.empty_like(small), requires_grad=False))
    layer.out_features, layer.in_features = layer.weight.shape


def read_shard(model_dir: Path, plan: Plan, shard: Shard) -> dict[str, torch.Tensor]:
    """Read one shard's part of every tensor of a checkpoint, on the CPU.

    Raises:
        ConfigError: There are no safetensors.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in _weight_files(model_dir):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no mapping
                axis = plan.axis(name)
                if axis is None:
                    tensors[name] = file.get_tensor(name)
                    continue
                part = file.get_slice(name)
                start, stop = shard.bounds(part.get_shape()[axis])
                tensors[name] = part[start:stop] if axis == 0 else part[:, start:stop]
    return tensors


def _weight_files(model_dir: Path) -> list[Path]:
    index = model_dir / _INDEX
    if index.is_file():
        return [model_dir / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if not (model_dir / _SINGLE).is_file():
        raise ConfigError(
            f"model: {model_dir} has neither {_SINGLE} nor {_INDEX}, which a shard is read from; convert the "
            "checkpoint to safetensors, or use parallel.tensor: 1"
        )
    return [model_dir / _SINGLE]


def connect(model: Any, plan: Plan, group: TensorGroup) -> None:
    """Let the split layers of a loaded shard exchange what they have to, and describe the shard in its config.

    The leader's forward pass then returns all logits, the others' a part of them that means nothing by itself.
    """
    for name, style in plan.styles.items():
        layer = model.get_submodule(name)
        if style in _GATHERED:
            layer.forward = _gathering(layer, group)
        elif style in _ROWS:
            layer.forward = _reducing(layer, group, splits_input=style in _SPLIT_INPUT)
    _split_output(model, group)
    if plan.splits_heads:
        # The paged cache is made for as many heads as the config says.
        config = model.config.get_text_config()
        if getattr(config, "head_dim", None) is None:
            config.head_dim = config.hidden_size // config.num_attention_heads
        for field in ("num_attention_heads", "num_key_value_heads"):
            if getattr(config, field, None) is not None:
                setattr(config, field, getattr(config, field) // group.world_size)


def _gathering(layer: Any, group: TensorGroup) -> Callable[[torch.Tensor], torch.Tensor]:
    compute = layer.forward
    return lambda hidden: group.all_gather(compute(hidden))


def _reducing(layer: Any, group: TensorGroup, *, splits_input: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    multiply = product_of(layer)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        if splits_input:
            size = layer.weight.shape[1]
            hidden = hidden.narrow(-1, group.rank * size, size)
        output = group.all_reduce(multiply(hidden))
        return output if layer.bias is None else output + layer.bias

    return forward


def _split_output(model: Any, group: TensorGroup) -> None:
    """Leave each rank its part of the vocabulary, and let the leader collect the logits."""
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        return
    vocab_size = layer.weight.shape[0]
    shard = Shard(group.rank, group.world_size)
    (start, stop), (_, widest) = shard.bounds(vocab_size), Shard(0, group.world_size).bounds(vocab_size)
    embeddings = model.get_input_embeddings()
    weight = layer.weight.data[start:stop]
    if embeddings is None or embeddings.weight is not layer.weight:
        weight = weight.clone()  # or else all of it would stay in memory
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.data[start:stop].clone(), requires_grad=False)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        logits = nn.functional.linear(hidden, layer.weight, layer.bias)
        if stop - start < widest:
            logits = nn.functional.pad(logits, (0, widest - (stop - start)))
        whole = group.gather(logits)
        return logits if whole is None else whole[..., :vocab_size]

    layer.forward = forward  # type: ignore[method-assign,assignment]  # as the library does
