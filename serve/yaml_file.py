"""A YAML file that an operator wrote, or a message that names it."""

from pathlib import Path
from typing import Any

import yaml

from serve.errors import ConfigError


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
