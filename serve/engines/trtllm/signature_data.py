"""Signatures of TensorRT-LLM's classes: those that come with this package, and those of the installed library."""

import dataclasses
import difflib
import importlib
import inspect
import json
import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from serve.engines.trtllm.call import ConstructorCall
from serve.engines.trtllm.line import Line
from serve.errors import ConfigError

logger = logging.getLogger(__name__)

_Classes = Mapping[str, Mapping[str, Mapping[str, Any]]]
_FOLDER = Path(__file__).parent / "signatures"
_ARGUMENTS = {
    "tensorrt_llm:LLM": "tensorrt_llm.llmapi.llm_args:TorchLlmArgs",
    "tensorrt_llm._tensorrt_engine:LLM": "tensorrt_llm.llmapi.llm_args:TrtLlmArgs",
}
_ACCEPTED = {"backend", "_mpi_session"}  # by the constructor, whatever the arguments' model says
# What RayTRT decides itself, or what would break the port's promises.
_OWN_KEYWORDS = frozenset(
    {
        "model", "tokenizer", "skip_tokenizer_init", "tensor_parallel_size", "pipeline_parallel_size",
        "context_parallel_size", "gpus_per_node", "moe_expert_parallel_size", "moe_tensor_parallel_size", "backend",
        "orchestrator_type", "ray_placement_config", "_mpi_session", "max_beam_width", "env_overrides",
        "num_postprocess_workers", "postprocess_tokenizer_dir", "enable_iter_perf_stats", "revision",
    }
)  # fmt: skip


def packaged(line: Line) -> _Classes:
    """Return the signatures that come with this package: target -> keyword -> {type, default[, status]}."""
    classes: _Classes = json.loads((_FOLDER / f"{line}.json").read_text())["classes"]
    return classes


def check_names(call: ConstructorCall, line: Line, installed: bool = False) -> None:
    """Check every keyword of a call and of the calls inside: TensorRT-LLM refuses unknown ones.

    Args:
        call: What will be made.
        line: Whose signatures are asked.
        installed: Ask the installed classes first, which are right in doubt; imports TensorRT-LLM.

    Raises:
        ConfigError: A class or a keyword does not exist there.
    """
    classes = packaged(line)
    for part in call.nested():
        stored = classes.get(part.target)
        names: Collection[str] | None = stored
        if installed:
            found = _installed_names(part.target)
            names = found if found is not None else stored
            if found is not None and stored is not None:
                _log_differences(part.target, set(stored), found, line)
        if names is None:
            raise ConfigError(f"TensorRT-LLM {line} has no class {part.target} that is known here")
        for keyword in part.keywords:
            if keyword not in names:
                raise ConfigError(_unknown(part.class_name, keyword, names, line))
    _check_dictionaries(call, classes, line)


def merge_extra(call: ConstructorCall, extra: Mapping[str, Any]) -> ConstructorCall:
    """Add the keywords that an operator gave by TensorRT-LLM's own names.

    Raises:
        ConfigError: One of them is decided by RayTRT, or by another setting.
    """
    keywords = dict(call.keywords)
    for name, value in extra.items():
        if name in _OWN_KEYWORDS:
            raise ConfigError(f"engine.extra.{name}: RayTRT decides this itself; remove it")
        ours = keywords.get(name)
        if name not in keywords:
            keywords[name] = value
        elif isinstance(ours, ConstructorCall) and isinstance(value, Mapping):
            twice = sorted(set(ours.keywords) & set(value))
            if twice:
                raise ConfigError(
                    f"engine.extra.{name}: {', '.join(twice)} follow from other settings; use those, and remove it here"
                )
            keywords[name] = ConstructorCall(ours.target, {**ours.keywords, **value})
        else:
            raise ConfigError(f"engine.extra.{name}: follows from another setting; use that, and remove it here")
    return ConstructorCall(call.target, keywords)


def _check_dictionaries(call: ConstructorCall, stored: _Classes, line: Line) -> None:
    """Check keys of dictionaries in `extra`, where the signature tells which class TensorRT-LLM makes of them."""
    classes = {target.partition(":")[2]: fields for target, fields in stored.items()}
    for keyword, value in call.keywords.items():
        if not isinstance(value, Mapping):
            continue
        declared = stored.get(call.target, {}).get(keyword, {}).get("type", "")
        known = [name for name in re.findall(r"\w+Config\b", declared) if name in classes]
        if len(known) == 1 and "Union" not in declared:
            for key in value:
                if key not in classes[known[0]]:
                    raise ConfigError(_unknown(known[0], str(key), classes[known[0]], line))


def _unknown(owner: str, keyword: str, names: Collection[str], line: Line) -> str:
    near = difflib.get_close_matches(keyword, names, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else "remove it"
    return f"{owner} of TensorRT-LLM {line} has no keyword {keyword!r}; {remedy}"


def _installed_names(target: str) -> set[str] | None:
    """Return the keywords of an installed class; None if it does not tell."""
    module, _, name = _ARGUMENTS.get(target, target).partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None
    fields = getattr(found, "model_fields", None)
    if isinstance(fields, Mapping):
        names = set(fields)
        for info in fields.values():
            names |= {alias for alias in (info.alias, info.validation_alias) if isinstance(alias, str)}
            names |= {choice for choice in getattr(info.validation_alias, "choices", ()) if isinstance(choice, str)}
        return names | (_ACCEPTED if target in _ARGUMENTS else set())
    if dataclasses.is_dataclass(found):
        return {field.name for field in dataclasses.fields(found) if field.init}
    parameters = inspect.signature(found).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name for parameter in parameters}


def _log_differences(target: str, stored: set[str], found: set[str], line: Line) -> None:
    added, gone = sorted(found - stored - _ACCEPTED), sorted(stored - found - _ACCEPTED)
    if added or gone:
        logger.info(
            "%s differs from what is known of TensorRT-LLM %s: new %s; gone %s. The installed one counts.",
            target,
            line,
            ", ".join(added) or "none",
            ", ".join(gone) or "none",
        )
