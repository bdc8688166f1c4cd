"""ModelDirectory: what a local model directory holds, told by its `config.json`, and what a built engine fixes."""

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from serve.errors import ConfigError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


class DirectoryKind(StrEnum):
    """What a model directory holds."""

    HUGGING_FACE = "Hugging Face checkpoint"
    CHECKPOINT = "TensorRT-LLM checkpoint"
    ENGINE = "TensorRT engine"


@dataclass(frozen=True)
class BuiltEngine:
    """What was fixed when an engine was built; None: its config does not tell.

    Attributes:
        version: TensorRT-LLM that built it.
        tensor, pipeline, context: Its parallel sizes.
        max_batch_size, max_num_tokens, max_seq_len: Its limits.
        tokens_per_block: Size of its KV blocks.
        gather_context_logits, gather_generation_logits: Whether it keeps the logits of prompts, of the output.
    """

    version: str | None
    tensor: int
    pipeline: int
    context: int
    max_batch_size: int | None
    max_num_tokens: int | None
    max_seq_len: int | None
    tokens_per_block: int | None
    gather_context_logits: bool = False
    gather_generation_logits: bool = False


@dataclass(frozen=True)
class ModelDirectory:
    """A local model directory.

    Attributes:
        path: Absolute: TensorRT-LLM takes any other string for the id of a model on a hub.
        kind: What it holds.
        tokenizer: Directory of the tokenizer's files; None: there is none, neither inside nor in `tokenizer` beside it.
        built: Of an engine directory.
    """

    path: Path
    kind: DirectoryKind = DirectoryKind.HUGGING_FACE
    tokenizer: Path | None = None
    built: BuiltEngine | None = None


def read_model_directory(path: Path) -> ModelDirectory:
    """Look what is in a directory.

    Raises:
        ConfigError: It is not there, has no readable `config.json`, or lacks engine files.
    """
    path = path.expanduser().absolute()
    try:
        config = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"model: {path} has no config.json; give the local directory of a checkpoint or engine, the same path on "
            "every node (TensorRT-LLM would take another string for the id of a model on a hub)"
        ) from None
    except (OSError, ValueError) as exc:
        raise ConfigError(f"model: {path / 'config.json'} cannot be read: {exc}") from None
    if not isinstance(config, dict):
        raise ConfigError(
            f"model: {path / 'config.json'} holds no object; give the directory of a checkpoint or engine"
        )
    tokenizer = _tokenizer_directory(path)
    if "pretrained_config" in config and "build_config" in config:
        built = _built_engine(config)
        _check_rank_files(path, built)
        return ModelDirectory(path, DirectoryKind.ENGINE, tokenizer, built)
    if "architecture" in config and "dtype" in config:
        return ModelDirectory(path, DirectoryKind.CHECKPOINT, tokenizer)
    return ModelDirectory(path, DirectoryKind.HUGGING_FACE, tokenizer)


def _tokenizer_directory(path: Path) -> Path | None:
    for folder in (path, path / "tokenizer", path.parent / "tokenizer"):
        if any((folder / name).is_file() for name in _TOKENIZER_FILES):
            return folder
    return None


def _built_engine(config: dict[str, Any]) -> BuiltEngine:
    mapping = config["pretrained_config"].get("mapping", {})
    build = config["build_config"]
    return BuiltEngine(
        version=config.get("version"),
        tensor=mapping.get("tp_size", 1),
        pipeline=mapping.get("pp_size", 1),
        context=mapping.get("cp_size", 1),
        max_batch_size=build.get("max_batch_size"),
        max_num_tokens=build.get("max_num_tokens"),
        max_seq_len=build.get("max_seq_len"),
        tokens_per_block=build.get("plugin_config", {}).get("tokens_per_block"),
        gather_context_logits=bool(build.get("gather_context_logits")),
        gather_generation_logits=bool(build.get("gather_generation_logits")),
    )


def _check_rank_files(path: Path, built: BuiltEngine) -> None:
    world_size = built.tensor * built.pipeline * built.context
    missing = [f"rank{rank}.engine" for rank in range(world_size) if not (path / f"rank{rank}.engine").is_file()]
    if missing:
        raise ConfigError(
            f"model: {path} is an engine of {world_size} ranks, but lacks {', '.join(missing)}; copy it again"
        )
