"""A YAML file that an operator wrote, or a message that names it."""

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from serve.core.strict_model import describe_mistakes
from serve.errors import ConfigError

_Model = TypeVar("_Model", bound=BaseModel)


def read_settings(model: type[_Model], path: Path) -> _Model:
    """Read a file that holds one model, such as configs/slo/chat.yaml.

    Raises:
        ConfigError: It cannot be read, or there is a mistake in it; names file and key.
    """
    document = read_yaml(path)
    try:
        return model.model_validate(document)
    except ValidationError as exc:
        raise ConfigError(describe_mistakes(exc, f"{path}: ")) from None


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds.

    Raises:
        ConfigError: It cannot be read, or is no YAML.
    """
    try:
        return yaml.safe_load(path.read_text())
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}; give the path of a config file") from None
    except (UnicodeDecodeError, yaml.YAMLError) as exc:
        raise ConfigError(f"{path} is no YAML: {exc}") from None
