"""Slo: when a request was served well."""

from pathlib import Path
from typing import Self

from pydantic import Field, PositiveFloat, ValidationError

from serve.core.strict_model import StrictModel, describe_mistakes
from serve.errors import ConfigError
from serve.yaml_file import read_yaml


class Slo(StrictModel):
    """Limits that a request has to meet, both."""

    ttft_ms: PositiveFloat = Field(default=2000.0, description="Time to the first token.")
    tpot_ms: PositiveFloat = Field(default=50.0, description="Mean time of each further token.")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file such as configs/slo/chat.yaml.

        Raises:
            ConfigError: It cannot be read, or there is a mistake in it.
        """
        try:
            return cls.model_validate(read_yaml(path))
        except ValidationError as exc:
            raise ConfigError(describe_mistakes(exc, f"{path}: ")) from None
