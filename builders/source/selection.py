"""Which files of a checkpoint are taken, and whether all are there. PURE: names and sizes in, names out.

Taken is what an engine, a tokenizer or ModelOpt reads; weights only once, in the safest format there is. Other copies
of the weights (Meta's `original/`, `consolidated.*`, ONNX, GGUF) are left.
"""

import fnmatch
from collections.abc import Collection, Mapping
from typing import Any

from serve.errors import ConfigError

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
SAFETENSORS_INDEX = "model.safetensors.index.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"
INDICES = (SAFETENSORS_INDEX, PICKLE_INDEX)

# What a directory of the layout holds besides weights.
_SIDE_FILES = (
    "*.json",
    "*.jinja",
    "*.model",  # SentencePiece
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
    "additional_chat_templates/*.jinja",
)
_TOKENIZER_FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "additional_chat_templates/*.jinja",
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_NO_WEIGHTS = ("training_args.bin", "optimizer*", "scheduler*", "rng_state*", "consolidated*", "*tokenizer*")
_CODE = "*.py"


def select_files(names: Collection[str], *, allow_pickle: bool, allow_code: bool, where: str) -> tuple[str, ...]:
    """Choose the files that are taken.

    Args:
        names: All files, relative, with `/`.
        allow_pickle: Take weights that are Python pickles, if there are no others.
        allow_code: Take Python files, too.
        where: The source, for messages.

    Returns:
        In order.

    Raises:
        ConfigError: config.json or weights are missing, or the weights are pickles; says which, and the remedy.
    """
    if CONFIG not in names:
        hint = "; it holds GGUF files, which are of another engine" if _matching(names, ("*.gguf",)) else ""
        raise ConfigError(
            f"source.location: {where} holds no {CONFIG}{hint}; give a checkpoint in Hugging Face's layout"
        )
    weights = _weights(names, ("*.safetensors",))
    pickles = _weights(names, _PICKLES)
    if not weights and pickles and not allow_pickle:
        raise ConfigError(
            f"source.allow_pickle: {where} has its weights as Python pickles only ({_first(pickles)}), which run any "
            "code that is in them when they are loaded. Convert them to safetensors (load the model and "
            "`save_pretrained` it), or set source.allow_pickle: true if you trust who made them"
        )
    weights = weights or pickles
    if not weights:
        raise ConfigError(
            f"source.location: {where} holds no weights: neither *.safetensors nor {', '.join(_PICKLES)}; is its "
            "download complete?"
        )
    sides = _matching(names, _SIDE_FILES)
    if any(name.endswith(".safetensors") for name in weights):
        sides = [name for name in sides if name != PICKLE_INDEX]
    code = [name for name in names if fnmatch.fnmatchcase(name, _CODE)] if allow_code else []
    return tuple(sorted({*weights, *sides, *code}))


def check_shards(names: Collection[str], index: Mapping[str, Any], index_name: str, where: str) -> None:
    """Check that every shard that an index lists is there.

    Raises:
        ConfigError: Names those that are missing.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"source.location: {index_name} of {where} has no weight_map; fetch it again")
    shards = sorted(set(map(str, weight_map.values())))
    missing = [shard for shard in shards if shard not in names]
    if missing:
        raise ConfigError(
            f"source.location: {where} lacks {len(missing)} of the {len(shards)} weight files that {index_name} lists: "
            f"{_first(missing)}; complete its download"
        )


def tokenizer_files(names: Collection[str]) -> tuple[str, ...]:
    """Return the files of the tokenizer and its chat template, in order."""
    return tuple(sorted(_matching(names, _TOKENIZER_FILES)))


def is_pickle(name: str) -> bool:
    """Whether a file is a Python pickle by its name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _PICKLES)


def _weights(names: Collection[str], patterns: tuple[str, ...]) -> list[str]:
    found = [name for name in names if "/" not in name and _matching([name], patterns)]
    whole = [name for name in found if not _matching([name], _NO_WEIGHTS)]
    # A repository in Mistral's own layout has consolidated.safetensors only.
    return sorted(whole or [name for name in found if fnmatch.fnmatchcase(name, "consolidated*.safetensors")])


def _matching(names: Collection[str], patterns: tuple[str, ...]) -> list[str]:
    return [
        name
        for name in names
        if any(fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)
    ]


def _first(names: Collection[str], count: int = 4) -> str:
    shown = sorted(names)[:count]
    return ", ".join(shown) + (f" and {len(names) - count} more" if len(names) > count else "")
