"""Which layers of a checkpoint are quantized, by the names that its files have. Needs PyTorch and transformers.

Kept as they are, as ModelOpt keeps them too: embeddings and the output head, which cost accuracy out of proportion;
routers of experts and their like, whose decisions rounding would flip; convolutions; and what the operator excludes.
"""

import fnmatch
import re
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
import transformers
from torch import nn

from serve.errors import ConfigError

# Of ModelOpt's presets: modules whose quantizers are off whatever the recipe.
ALWAYS_KEPT = (
    "*lm_head", "*output_layer", "*router*", "*mlp.gate", "*block_sparse_moe.gate", "*shared_expert_gate", "*proj_out",
    "*linear_attn.conv1d", "*linear_attn.in_proj_a", "*linear_attn.in_proj_b", "*mixer.conv1d", "mtp.*",
    "*vision_tower*", "*visual*", "*vision_model*", "*multi_modal_projector*", "*embed_vision*",
)  # fmt: skip
# A checkpoint has each expert by itself where the library's model has them in one tensor.
_EXPERT = re.compile(r"\.experts\.\d+\.\w+$")


def linear_layers(directory: Path, *, trust_remote_code: bool = False) -> frozenset[str]:
    """Return the names of all linear layers of a checkpoint's model but its output head.

    Raises:
        ConfigError: The library does not know the model.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code
        )
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as exc:  # the library raises whatever its models raise
        raise ConfigError(
            f"source.location: transformers {transformers.__version__} cannot make the model of {directory}: {exc}"
        ) from exc
    head = model.get_output_embeddings()
    return frozenset(name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module != head)


def quantized_layers(names: Iterable[str], linears: Collection[str], exclude: Collection[str]) -> tuple[str, ...]:
    """Return the layers whose weights are quantized, in order.

    Args:
        names: Of the checkpoint's tensors.
        linears: Of the model's linear layers; a checkpoint's names may lack their first part.
        exclude: The operator's patterns.
    """
    endings = {name.partition(".")[2] for name in linears}
    weights = (name.removesuffix(".weight") for name in names if name.endswith(".weight"))
    found = [layer for layer in weights if layer in linears or layer in endings or _EXPERT.search(layer)]
    return tuple(sorted(layer for layer in found if not is_kept(layer, exclude)))


def is_kept(layer: str, exclude: Collection[str]) -> bool:
    """Whether a layer stays as it is. A pattern means a module and all below it; `*` stands for anything."""
    patterns = (*ALWAYS_KEPT, *exclude)
    return any(fnmatch.fnmatchcase(layer, part) for pattern in patterns for part in (pattern, f"{pattern}.*"))


def check_exclude(names: Iterable[str], exclude: Collection[str]) -> None:
    """Check that every pattern means something: a misspelt one would let a layer be quantized that should not be.

    Args:
        names: Of the checkpoint's tensors.
        exclude: The operator's patterns.

    Raises:
        ConfigError: One matches no module.
    """
    modules = {name.rpartition(".")[0] for name in names}
    modules |= {".".join(name.split(".")[:depth]) for name in modules for depth in range(1, name.count(".") + 1)}
    for pattern in exclude:
        tied = pattern in ALWAYS_KEPT or pattern == "lm_head"  # a head that is tied to the embeddings has no tensors
        if not tied and not fnmatch.filter(modules, pattern):
            raise ConfigError(
                f"quantize.exclude: {pattern!r} matches no module of the model; names look like {min(modules, key=len)}"
                f" and {max(modules, key=len)}, and * stands for anything"
            )
