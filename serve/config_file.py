"""ConfigFile: one Serve config file, read and checked once, Ray Serve's part and ours."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from serve.config import IMPORT_PATH, AppConfig, parse_applications
from serve.core.strict_model import describe_mistakes
from serve.errors import ConfigError
from serve.yaml_file import read_yaml


@dataclass(frozen=True)
class ConfigFile:
    """What `raytrt` needs to know of a config file.

    Attributes:
        path: Where it is.
        document: What it holds.
        applications: Ours, by name.
        host, port: Where the HTTP ingress will listen; a wildcard address is given as the loopback one.
        url: Of our first application.
    """

    path: Path
    document: dict[str, Any]
    applications: dict[str, AppConfig]
    host: str
    port: int
    url: str

    @property
    def drain_timeout_s(self) -> float:
        """Longest time that any replica or gateway of the file takes to finish its streams."""
        return max(
            max([app.gateway.drain_timeout_s, *(model.limits.drain_timeout_s for model in app.models)])
            for app in self.applications.values()
        )


def read_config_file(path: Path) -> ConfigFile:
    """Read and check a config file.

    Raises:
        ConfigError: It cannot be read, is no Serve config, or holds a mistake; names file and key.
    """
    document = read_yaml(path)
    applications = parse_applications(document, str(path))
    try:
        options = ServeDeploySchema.model_validate(document).http_options
    except ValidationError as exc:
        raise ConfigError(describe_mistakes(exc, str(path))) from None
    except ValueError as exc:
        raise ConfigError(f"{path}: {exc}") from None
    host = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
    first = next(entry for entry in document["applications"] if entry.get("import_path") == IMPORT_PATH)
    prefix = str(first.get("route_prefix") or "/").rstrip("/")
    return ConfigFile(path, document, applications, host, options.port, f"http://{host}:{options.port}{prefix}")
