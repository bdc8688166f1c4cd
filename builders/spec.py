"""BuildSpec: models of configs/builds, checked before anything starts."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from builders.quantize.recipes import recipe_mistakes
from builders.settings.compile import CompileSettings
from builders.settings.quantize import QuantizeSettings
from builders.settings.source import SourceSettings
from builders.settings.target import TargetSettings
from builders.settings.tune import TuneSettings
from builders.settings.verify import VerifySettings
from serve.artifacts.manifest import BundleKind
from serve.artifacts.reference import DEFAULT_ALIAS, NAME
from serve.core.parallel import ParallelLayout
from serve.core.strict_model import StrictModel, describe_mistakes
from serve.engines.transformers.settings import TransformersSettings
from serve.engines.trtllm.settings import TrtllmSettings
from serve.errors import ConfigError
from serve.yaml_file import read_yaml


def _location(value: Any) -> Any:
    return {"location": value} if isinstance(value, str) else value


def _recipe(value: Any) -> Any:
    return {"recipe": value} if isinstance(value, str) else value


class BuildSpec(StrictModel):
    """One build: a checkpoint, what is made of it, for which nodes, and what it has to hold."""

    name: str = Field(pattern=f"^{NAME.pattern}$", description="Under which the bundle is published.")
    store: str = Field(
        default="~/.raytrt/store",
        description="Directory, which every node has to see, or fsspec URL (s3://bucket/path, gs://, ...).",
    )
    kind: BundleKind = Field(default=BundleKind.TRANSFORMERS_CHECKPOINT, description="What is made.")
    source: Annotated[SourceSettings, BeforeValidator(_location)] = SourceSettings(location="builtin:quickstart")
    quantize: Annotated[QuantizeSettings, BeforeValidator(_recipe)] = QuantizeSettings()
    parallel: ParallelLayout = ParallelLayout()
    target: TargetSettings = TargetSettings()
    engine: dict[str, Any] = Field(
        default={}, description="Settings of the engine that the bundle starts from, as in a deployment's config."
    )
    compile: CompileSettings = CompileSettings()
    tune: TuneSettings = TuneSettings()
    verify: VerifySettings = VerifySettings()
    fallback: Literal["transformers"] | None = Field(
        default=None, description="What is published if the build fails: the unquantized checkpoint, for that engine."
    )
    aliases: tuple[str, ...] = Field(
        default=(), description="Aliases that are moved to the bundle once it is published."
    )

    @field_validator("aliases")
    @classmethod
    def _aliases_can_move(cls, aliases: tuple[str, ...]) -> tuple[str, ...]:
        for alias in aliases:
            if not NAME.fullmatch(alias) or alias.isdigit():
                raise ValueError(f"{alias!r} is no alias; use letters, digits, '.', '_' and '-', and not a number")
            if alias == DEFAULT_ALIAS:
                raise ValueError(f"{alias!r} moves by itself, to the newest version; choose another alias")
        return aliases

    @model_validator(mode="after")
    def _engine_is_good(self) -> Self:
        try:
            self.engine_settings()
        except ValidationError as exc:
            raise ValueError(describe_mistakes(exc, "engine")) from None
        return self

    @model_validator(mode="after")
    def _recipe_fits_kind(self) -> Self:
        if mistakes := recipe_mistakes(self.quantize, self.kind):
            raise ValueError("; ".join(mistakes))
        return self

    def engine_settings(self) -> TrtllmSettings | TransformersSettings:
        """Return the engine's settings to start from."""
        section = {key: value for key, value in self.engine.items() if key != "kind"}
        if self.engine.get("kind", self.kind.engine) != self.kind.engine:
            raise ValueError(
                f"engine.kind={self.engine['kind']!r} does not load a {self.kind.value}; remove it, or change `kind`"
            )
        settings = TransformersSettings if self.kind.engine == "transformers" else TrtllmSettings
        return settings.model_validate(section)


def read_spec(path: Path) -> BuildSpec:
    """Read a build file.

    Raises:
        ConfigError: It cannot be read, or there is a mistake in it; names file and key.
    """
    return parse_spec(read_yaml(path), str(path))


def parse_spec(document: Any, source: str = "build") -> BuildSpec:
    """Check a build.

    Raises:
        ConfigError: Each mistake with its key, one a line.
    """
    try:
        return BuildSpec.model_validate(document)
    except ValidationError as exc:
        raise ConfigError(describe_mistakes(exc, source)) from None
