"""A fetched checkpoint: whether it is whole, and what it is."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builders.source.selection import CONFIG, INDICES, check_shards
from builders.source.weights import count_parameters
from serve.errors import ConfigError
from serve.ingress.model_files import read_model_files


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint is.

    Attributes:
        architecture: First of `architectures` in config.json.
        parameters: Number of weights; 0: they are pickles, which nobody looks into.
    """

    architecture: str
    parameters: int


def check_checkpoint(directory: Path, names: tuple[str, ...], where: str) -> Checkpoint:
    """Check that a checkpoint is whole, with a tokenizer that the gateway can read.

    Args:
        directory: It.
        names: Its files that count.
        where: The source, for messages.

    Raises:
        ConfigError: A file is missing, cut off or unreadable; names it, and the remedy.
    """
    config = _read_object(directory / CONFIG, where)
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise ConfigError(
            f"source.location: {CONFIG} of {where} names no architectures; give a checkpoint in Hugging Face's layout"
        )
    for index in INDICES:
        if index in names:
            check_shards(names, _read_object(directory / index, where), index, where)
    read_model_files(directory)
    weights = [directory / name for name in names if name.endswith(".safetensors")]
    return Checkpoint(str(architectures[0]), count_parameters(weights, where))


def _read_object(path: Path, where: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as exc:
        raise ConfigError(f"source.location: {path.name} of {where} cannot be read ({exc}); fetch it again") from None
    if not isinstance(value, dict):
        raise ConfigError(f"source.location: {path.name} of {where} holds no JSON object; fetch it again")
    return value
