"""Models of configs/deployments: `args` of the application in a Serve config file, checked before anything starts."""

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveInt, ValidationError, model_validator

from serve.artifacts.manifest import MODEL, TOKENIZER
from serve.artifacts.reference import BundleReference, parse_reference
from serve.core.parallel import ParallelLayout
from serve.core.routing.settings import ModelRouting, PredictiveSettings
from serve.core.strict_model import StrictModel, describe_mistakes
from serve.engines.simulated.settings import SimulatedSettings
from serve.engines.transformers.head_check import check_heads
from serve.engines.transformers.settings import TransformersSettings
from serve.engines.trtllm.settings import TrtllmSettings
from serve.errors import ConfigError
from serve.ingress.settings import GatewaySettings
from serve.workers.bundle_settings import BundleSettings
from serve.workers.engine_env import EngineEnv
from serve.workers.group_settings import GroupSettings
from serve.workers.launch import check_fallback, check_launch
from serve.workers.settings import RankResources, ReplicaSettings, ScalingSettings

IMPORT_PATH = "serve.app:build_app"
BUILTIN_MODELS = Path(__file__).parent / "models"
_BUILTIN = "builtin:"


def _engine_section(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


EngineSettings = Annotated[
    TrtllmSettings | TransformersSettings | SimulatedSettings,
    Field(discriminator="kind"),
    BeforeValidator(_engine_section),
]


Fallback = Annotated[TransformersSettings, BeforeValidator(_engine_section)]


class ModelConfig(StrictModel):
    """One model: what to load, with which engine, on how many replicas."""

    id: str = Field(
        min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]*$", description="What clients put into `model`."
    )
    model: str = Field(
        default="builtin:quickstart",
        description="Checkpoint directory (config.json, tokenizer.json, *.safetensors), the same path on every node; "
        "or builtin:quickstart, the small model that comes with the package.",
    )
    bundle: str | None = Field(
        default=None,
        description="Instead of `model`: an engine bundle, store/name@alias (s3://bundles/llama-3.1-8b@prod, "
        "./store/quickstart@3). It brings model, tokenizer, `engine` and `parallel`; what is set here comes before its "
        "tuned settings. See docs/serving-bundles.md.",
    )
    bundle_fingerprint: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{64}$",
        description="The bundle that `bundle` meant when this was deployed; `raytrt up` and `raytrt deploy` fill it "
        "in, so that Serve sees that an alias has moved. None: the alias is read when the application is built.",
    )
    tokenizer: str | None = Field(
        default=None,
        description="Directory of the tokenizer's files and the Hugging Face config.json, on every gateway's node; "
        "None: the model's own, or the folder `tokenizer` in it.",
    )
    engine: EngineSettings = Field(
        default=TransformersSettings(), description="Name of an engine, or a section with its `kind` and settings."
    )
    replicas: PositiveInt | None = Field(default=None, description="A fixed number of replicas; default 1.")
    autoscaling: ScalingSettings | None = Field(default=None, description="A number that follows the load instead.")
    parallel: ParallelLayout = ParallelLayout()
    engine_env: EngineEnv | None = Field(
        default=None,
        description="The Python environment of the engine, if it is not the gateway's; see docs/environments.md.",
    )
    fallback: Fallback | None = Field(
        default=None,
        description="`transformers`, or a section with its settings: what serves the model if its engine fails to "
        "start `max_start_failures` times. /health, a metric and a header of every answer then say so.",
    )
    fallback_model: str | None = Field(
        default=None,
        description="With `bundle` and `fallback`: the checkpoint directory that the fallback loads. None: the "
        "bundle's own model if it is not quantized, else where the build found its source, if that is here.",
    )
    max_start_failures: PositiveInt = Field(
        default=2,
        description="With a fallback, or an earlier bundle of the alias: how often the engine is tried first. Without "
        "either, a replica tries once, and Serve makes another replica.",
    )
    routing: ModelRouting = Field(
        default=PredictiveSettings(),
        description="Name of a policy, or a section with `policy` and its parameters; see docs/routing.md.",
    )
    resources: RankResources = RankResources()
    limits: ReplicaSettings = ReplicaSettings()
    watch: GroupSettings = GroupSettings()
    bundle_check: BundleSettings = BundleSettings()

    @model_validator(mode="after")
    def _bundle_or_model(self) -> Self:
        if self.bundle is None:
            for name in ("bundle_fingerprint", "fallback_model"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` is for models with a `bundle`; remove it")
            return self
        for name in ("model", "tokenizer"):
            if name in self.model_fields_set:
                raise ValueError(f"`bundle` and `{name}` exclude each other, as a bundle has its own; remove one")
        try:
            parse_reference(self.bundle)
        except ConfigError as exc:
            raise ValueError(str(exc)) from None
        return self

    @model_validator(mode="after")
    def _replicas_or_autoscaling(self) -> Self:
        if self.replicas is not None and self.autoscaling is not None:
            raise ValueError("`replicas` and `autoscaling` exclude each other; remove one of them")
        return self

    @model_validator(mode="after")
    def _layout_fits_engine(self) -> Self:
        if self.bundle is not None and {"engine", "parallel"} - self.model_fields_set:
            return self  # the bundle says the rest
        try:
            check_launch(self.engine, self.parallel, self.resources)
        except ConfigError as exc:
            raise ValueError(str(exc)) from None
        if self.fallback is not None:
            check_fallback(self.engine, self.parallel)
        return self

    @property
    def reference(self) -> BundleReference | None:
        """Which bundle is served; None: a checkpoint is."""
        return None if self.bundle is None else parse_reference(self.bundle)

    @property
    def directory(self) -> Path:
        """Where the checkpoint lies; a bundle's lies elsewhere on each node, and is not known here."""
        if self.bundle is not None:
            return Path(self.bundle) / MODEL
        if self.model.startswith(_BUILTIN):
            return BUILTIN_MODELS / self.model.removeprefix(_BUILTIN)
        # Absolute: the Ray orchestrator would take another string for the id of a model on a hub.
        return Path(self.model).expanduser().absolute()

    @property
    def tokenizer_directory(self) -> Path:
        """Where the gateway finds what it needs of the model; a TensorRT engine has no tokenizer of its own."""
        if self.bundle is not None:
            return Path(self.bundle) / TOKENIZER
        if self.tokenizer is not None:
            return Path(self.tokenizer).expanduser().absolute()
        inside = self.directory / "tokenizer"
        return inside if inside.is_dir() and not (self.directory / "tokenizer.json").is_file() else self.directory

    @property
    def deployment_name(self) -> str:
        """Name of the model's Serve deployment; `serve status` and the `deployments` of a config file show it."""
        return "model-" + "".join(c if c.isalnum() or c in "._-" else "-" for c in self.id)

    def check_files(self) -> None:
        """Raise ConfigError if the checkpoint is not there, or cannot be split as asked. Bundles are not looked at."""
        if self.bundle is not None:
            return
        if self.model.startswith(_BUILTIN) and not self.directory.is_dir():
            known = ", ".join(f"{_BUILTIN}{path.name}" for path in sorted(BUILTIN_MODELS.iterdir()) if path.is_dir())
            raise ConfigError(f"models[{self.id}].model: {self.model!r} is not built in; there is {known}")
        self._check_directory("model", self.directory, "config.json")
        self._check_directory("tokenizer" if self.tokenizer else "model", self.tokenizer_directory, "tokenizer.json")
        try:
            if isinstance(self.engine, TransformersSettings):
                check_heads(self.directory, self.parallel.tensor)
            if self.fallback is not None:
                check_heads(self.directory, self.parallel.world_size, "fallback")
        except ConfigError as exc:
            raise ConfigError(f"models[{self.id}].{exc}") from None

    def _check_directory(self, setting: str, directory: Path, needed: str) -> None:
        missing = [name for name in dict.fromkeys(("config.json", needed)) if not (directory / name).is_file()]
        if missing:
            raise ConfigError(
                f"models[{self.id}].{setting}: {directory} has no {' and no '.join(missing)}; give the directory of a "
                "Hugging Face checkpoint, with the same path on every node"
            )


class GatewayConfig(StrictModel):
    """The HTTP side: how many gateway processes, and their limits."""

    replicas: PositiveInt = Field(default=1, description="Gateway processes; each can carry thousands of streams.")
    num_cpus: NonNegativeFloat = Field(default=1.0, description="CPU cores that each reserves of its Ray node.")
    max_ongoing_requests: PositiveInt = Field(
        default=8192, description="HTTP requests that one gateway process holds; `limits.max_in_flight` refuses first."
    )
    drain_timeout_s: NonNegativeFloat = Field(default=300.0, description="A gateway that stops finishes its streams.")
    limits: GatewaySettings = GatewaySettings()


class AppConfig(StrictModel):
    """`args` of `serve.app:build_app`."""

    models: tuple[ModelConfig, ...] = Field(
        default=(ModelConfig(id="quickstart"),), min_length=1, description="The models that are served."
    )
    gateway: GatewayConfig = GatewayConfig()

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        for what in ("id", "deployment_name"):
            names = [getattr(model, what) for model in self.models]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"two models have the same {what}: {', '.join(twice)}; give each its own `id`")
        return self


def parse_app_config(args: Any, source: str = "args") -> AppConfig:
    """Check `args` of the application.

    Args:
        args: What the config file holds there.
        source: File or section, for the message.

    Raises:
        ConfigError: Each mistake with its key, its value and the reason, one a line.
    """
    try:
        return AppConfig.model_validate(args)
    except ValidationError as exc:
        raise ConfigError(describe_mistakes(exc, source)) from None


def parse_applications(document: Any, source: str, *, check_files: bool = True) -> dict[str, AppConfig]:
    """Check the `args` of every application of a Serve config that is ours.

    Args:
        document: The parsed file.
        source: Its path, for the message.
        check_files: Whether the models' files have to be on this machine.

    Returns:
        The applications' names and configs.

    Raises:
        ConfigError: It is no Serve config, none is ours, or there is a mistake; names file and key.
    """
    applications = document.get("applications") if isinstance(document, dict) else None
    if not isinstance(applications, list) or not all(isinstance(entry, dict) for entry in applications):
        raise ConfigError(
            f"{source}: no list `applications`; see configs/quickstart.yaml for the form of a config file"
        )
    configs = {}
    for number, entry in enumerate(applications):
        if entry.get("import_path") == IMPORT_PATH:
            part = f"{source}: applications[{number}].args"
            config = parse_app_config(entry.get("args") or {}, part)
            for model in config.models if check_files else ():
                try:
                    model.check_files()
                except ConfigError as exc:
                    raise ConfigError(f"{part}.{exc}") from None
            configs[str(entry.get("name", "default"))] = config
    if not configs:
        raise ConfigError(f"{source}: no application has `import_path: {IMPORT_PATH}`")
    return configs
