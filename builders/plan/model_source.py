"""find_model: the model that a command line names: a checkpoint, a hub's model, a known name, or a shape by flags."""

import json
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import fsspec
import yaml
from pydantic import ValidationError

from builders.plan.request import PlannedModel
from builders.settings.source import SourceSettings
from builders.source.location import BUILTIN, HubLocation, LocalLocation, UrlLocation, parse_location
from serve.core.strict_model import describe_mistakes
from serve.engines.simulated.checkpoint import Checkpoint, checkpoint_from_config, read_checkpoint
from serve.engines.simulated.known_models import CONFIGS, HUB
from serve.engines.simulated.model_shape import ModelShape
from serve.errors import ConfigError

SHAPE_EXAMPLE = "layers=32,hidden=4096,heads=32,kv_heads=8,head_dim=128,intermediate=14336,vocab=128256"
REMEDY = f"describe the model by its shape instead: --shape {SHAPE_EXAMPLE}"
_HUB_TIMEOUT_S = 10.0
_SUFFIXES = re.compile(r"-(instruct|chat|it|hf|base|v0\.\d|\d{4})(?=-|$)")
_FIELDS = ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab")


def find_model(text: str, shape: str | None = None) -> PlannedModel:
    """Find a model.

    Args:
        text: Directory of a checkpoint, its config.json, `builtin:quickstart`, `organisation/model` of the Hugging Face
            hub, an fsspec URL, or a name such as `llama-3.1-8b`; with `shape` any name.
        shape: `key=value` pairs of `ModelShape`, separated by commas.

    Raises:
        ConfigError: There is no such model, or it is not understood; says the remedy.
    """
    if shape is not None:
        return PlannedModel(_name(text), _location_of_path(text), parse_shape(shape))
    if text.lower() in CONFIGS:
        return _known(text.lower(), f"hf://{HUB[text.lower()]}")
    path = Path(text).expanduser()
    if path.suffix == ".json" and path.is_file():
        parent = path.absolute().parent
        return _planned(parent.name, str(parent), read_checkpoint(path, REMEDY))
    location = parse_location(SourceSettings(location=text), Path.cwd())
    match location:
        case HubLocation():
            return _of_hub(location)
        case UrlLocation():
            return _planned(text.rstrip("/").rpartition("/")[2], text, _of_url(location.url))
        case LocalLocation():
            return _of_directory(text, location.directory)


def parse_shape(text: str) -> ModelShape:
    """Read a shape from `key=value` pairs.

    Raises:
        ConfigError: A key is unknown or missing, or a value is wrong.
    """
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    try:
        return ModelShape.model_validate({key.strip(): yaml.safe_load(value) for key, _, value in pairs})
    except ValidationError as exc:
        raise ConfigError(
            f"{describe_mistakes(exc, '--shape')}\nwrite for instance {SHAPE_EXAMPLE}; {', '.join(_FIELDS)} are "
            f"needed, there are {', '.join(sorted(set(ModelShape.model_fields) - set(_FIELDS)))} besides"
        ) from None


def known_name(text: str) -> str | None:
    """Return the known model that a name on a hub means; None: none of them."""
    by_id = {repository.lower(): name for name, repository in HUB.items()}
    if text.lower() in by_id:
        return by_id[text.lower()]
    name = text.rpartition("/")[2].lower().replace("_", "-").removeprefix("meta-")
    for _ in range(3):
        if name in CONFIGS:
            return name
        name = _SUFFIXES.sub("", name, count=1)
    return name if name in CONFIGS else None


def _of_directory(text: str, directory: Path) -> PlannedModel:
    if not directory.exists():
        close = get_close_matches(text.lower(), CONFIGS, n=3)
        meant = f" (did you mean {' or '.join(close)}?)" if close else ""
        raise ConfigError(
            f"model: {text!r} is no directory and no model that is known by name{meant}; give a checkpoint's "
            f"directory, organisation/model of the Hugging Face hub, or one of {', '.join(CONFIGS)}"
        )
    builtin = text.startswith(BUILTIN)
    name = text.removeprefix(BUILTIN) if builtin else directory.name
    return _planned(name, text if builtin else str(directory), read_checkpoint(directory, REMEDY))


def _of_hub(location: HubLocation) -> PlannedModel:
    """Ask the hub, or its cache on this machine; without either, the name may be enough."""
    name, unreachable = location.repository.rpartition("/")[2], None
    try:
        import huggingface_hub  # an extra: who builds from local checkpoints needs no hub

        unreachable = _why_unreachable(location)
        path = huggingface_hub.hf_hub_download(
            location.repository,
            "config.json",
            revision=location.revision,
            local_files_only=unreachable is not None,
        )
        return _planned(name, str(location), read_checkpoint(Path(path), REMEDY))
    except ConfigError:
        raise
    except Exception as exc:  # of several HTTP libraries, by version
        known = known_name(location.repository)
        if known is None:
            why = unreachable or exc
            reason = (str(why).strip() or type(why).__name__).splitlines()[0]
            raise ConfigError(
                f"model: config.json of {location} cannot be read ({reason}); give a local directory, one of "
                f"{', '.join(CONFIGS)}, or {REMEDY}"
            ) from exc
        return _known(known, str(location))


def _why_unreachable(location: HubLocation) -> Exception | None:
    """Ask the hub for a model once, where a download would try for half a minute; returns why there is no answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(location.repository, revision=location.revision, timeout=_HUB_TIMEOUT_S)
    except HfHubHTTPError:
        raise
    except Exception as exc:  # of several HTTP libraries, by version
        return exc
    return None


def _of_url(url: str) -> Checkpoint:
    try:
        with fsspec.open(f"{url}/config.json") as file:
            return checkpoint_from_config(json.load(file))
    except ValidationError as exc:
        raise ConfigError(f"{describe_mistakes(exc, f'{url}/config.json: ')}\n{REMEDY}") from None
    except Exception as exc:  # of any file system
        raise ConfigError(f"{url}/config.json: {exc}; {REMEDY}") from exc


def _known(name: str, location: str) -> PlannedModel:
    return _planned(name, location, checkpoint_from_config(CONFIGS[name]))


def _planned(name: str, location: str, checkpoint: Checkpoint) -> PlannedModel:
    return PlannedModel(_name(name), location, checkpoint.shape, checkpoint.precisions, checkpoint.is_quantized)


def _location_of_path(text: str) -> str | None:
    path = Path(text).expanduser()
    return str(path.absolute()) if path.is_dir() else None


def _name(text: str) -> str:
    """Return what may be the name of a bundle."""
    cleaned: Any = re.sub(r"[^A-Za-z0-9._-]+", "-", text.rpartition("/")[2]).strip("-._")
    return cleaned[:60] or "model"
