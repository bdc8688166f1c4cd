"""SimDeployment: what is simulated, from the command line or from a config file of the service."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from serve.artifacts.bundle_source import BundleSource
from serve.artifacts.manifest import TOKENIZER
from serve.artifacts.store import open_store
from serve.bundle_models import resolve_model
from serve.config import ModelConfig, parse_applications
from serve.core.routing.settings import RoutingSettings
from serve.core.strict_model import describe_mistakes
from serve.engines.simulated.checkpoint import Checkpoint, quantized_precisions, read_checkpoint
from serve.engines.simulated.hardware import GPUS, Precision, gpu_named
from serve.engines.simulated.known_models import MODELS
from serve.engines.simulated.model_shape import ModelShape
from serve.engines.simulated.settings import FixedLatencySettings, RooflineSettings, SimulatedSettings
from serve.engines.simulated.split import Precisions
from serve.engines.transformers.settings import TransformersSettings
from serve.engines.trtllm.settings import TrtllmSettings
from serve.errors import ConfigError
from serve.yaml_file import read_yaml

_REMEDY = f"describe the model by --model instead, one of {', '.join(MODELS)}"
_KV_PRECISION: dict[str, Precision] = {"fp8": "fp8", "fp8_ds_mla": "fp8", "nvfp4": "fp4"}


@dataclass(frozen=True)
class Overrides:
    """What the command line says of the engines; None: nothing.

    Attributes:
        model, gpu: Names that the simulated engine knows.
        tensor_parallel: GPUs of a replica.
        weights, kv_cache: Precisions.
        tokens_per_block, cache_blocks, max_batch_size, max_num_tokens: As in the simulated engine's settings.
        cache_fraction: Of the KV blocks that there would be.
    """

    model: str | None = None
    gpu: str | None = None
    tensor_parallel: int | None = None
    weights: Precision | None = None
    kv_cache: Precision | None = None
    tokens_per_block: int | None = None
    cache_blocks: int | None = None
    cache_fraction: float | None = None
    max_batch_size: int | None = None
    max_num_tokens: int | None = None


@dataclass(frozen=True)
class SimDeployment:
    """One model's deployment.

    Attributes:
        engine: Of each replica.
        gpus_per_replica: For the cost.
        replicas: As configured; None: not said.
        gateways: As configured.
        routing: As configured; None: not said.
        notes: What is not simulated as it is configured.
    """

    engine: SimulatedSettings
    gpus_per_replica: int = 1
    replicas: int | None = None
    gateways: int = 1
    routing: RoutingSettings | None = None
    notes: tuple[str, ...] = ()


def make_deployment(overrides: Overrides) -> SimDeployment:
    """Describe a deployment by the command line alone.

    Raises:
        ConfigError: A name is unknown, or the sizes do not go together.
    """
    return _override(SimDeployment(SimulatedSettings()), overrides)


def read_deployment(path: Path, model_id: str | None, overrides: Overrides) -> SimDeployment:
    """Describe the deployment of a model in a config file.

    Args:
        path: A Serve config file as the service has it.
        model_id: Which model; None: there is one.
        overrides: What the command line changes.

    Raises:
        ConfigError: The file, the model or its engine cannot be simulated; says why, and the remedy.
    """
    applications = parse_applications(read_yaml(path), str(path), check_files=False)
    models = {model.id: (app, model) for app in applications.values() for model in app.models}
    if model_id is None and len(models) > 1:
        raise ConfigError(f"{path} has the models {', '.join(models)}: choose one by --config-model")
    if model_id is not None and model_id not in models:
        raise ConfigError(f"{path}: --config-model={model_id!r} is none of its models: {', '.join(models)}")
    app, model = models[model_id] if model_id is not None else next(iter(models.values()))
    resolved = resolve_model(model, open_store)
    model = resolved.config
    try:
        deployment = _of_model(path, model, resolved.bundle, overrides)
    except ValidationError as exc:
        raise ConfigError(describe_mistakes(exc, f"{path}: models[{model.id}] as simulated: ")) from None
    replicas = model.autoscaling.max_replicas if model.autoscaling is not None else model.replicas or 1
    notes = deployment.notes
    if model.autoscaling is not None and model.autoscaling.min_replicas != replicas:
        notes += (f"autoscaling is not simulated: there are max_replicas={replicas} replicas all the time",)
    deployment = replace(
        deployment, replicas=replicas, gateways=app.gateway.replicas, routing=model.routing, notes=notes
    )
    return _override(deployment, overrides)


def _of_model(path: Path, model: ModelConfig, bundle: BundleSource | None, overrides: Overrides) -> SimDeployment:
    engine = model.engine
    if isinstance(engine, SimulatedSettings):
        latency = engine.latency
        gpus = latency.tensor_parallel if isinstance(latency, RooflineSettings) else 1
        notes = []
        if engine.faults:
            notes.append("its scripted faults are not simulated")
        if engine.speed != 1.0:
            notes.append(f"speed={engine.speed:g} is taken as 1: virtual time needs no hurry")
        return SimDeployment(engine.model_copy(update={"faults": (), "speed": 1.0}), gpus, notes=tuple(notes))
    checkpoint = _checkpoint(model, bundle, overrides)
    latency = RooflineSettings.model_construct(
        model=checkpoint.shape,
        gpu=overrides.gpu or _gpu(path, model),
        tensor_parallel=model.parallel.tensor,
        pipeline_parallel=model.parallel.pipeline,
        expert_parallel=model.parallel.expert,
        weights=checkpoint.precisions.weights,
        attention_weights=checkpoint.precisions.attention,
        kv_cache=checkpoint.precisions.kv_cache,
    )
    if isinstance(engine, TransformersSettings):
        return SimDeployment(_of_transformers(engine, latency), model.parallel.world_size)
    return SimDeployment(_of_trtllm(engine, latency), model.parallel.world_size)


def _checkpoint(model: ModelConfig, bundle: BundleSource | None, overrides: Overrides) -> Checkpoint:
    if overrides.model is not None:
        checkpoint = Checkpoint(_known_model(overrides.model), Precisions(), overrides.model, False)
    elif bundle is not None:
        checkpoint = _bundle_checkpoint(bundle)
    else:
        checkpoint = read_checkpoint(model.directory, _REMEDY)
    if overrides.weights is None:
        return checkpoint
    return replace(checkpoint, precisions=Precisions(weights=overrides.weights))


def _bundle_checkpoint(bundle: BundleSource) -> Checkpoint:
    """Read what a bundle was made of, and how its weights are quantized, whatever holds them."""
    with tempfile.TemporaryDirectory(prefix="raytrt-") as name:
        directory, path = Path(name), f"{TOKENIZER}/config.json"
        wanted = [entry for entry in bundle.manifest.files if entry.path == path]
        open_store(bundle.store).materialize(wanted, directory)
        checkpoint = read_checkpoint(directory / path, _REMEDY)
    made = bundle.manifest.quantization
    if made.algorithm is None and made.kv_cache_algorithm is None:
        return checkpoint
    try:
        return replace(checkpoint, precisions=quantized_precisions(made.algorithm, made.kv_cache_algorithm))
    except ValueError as exc:
        raise ConfigError(f"bundle {bundle}: {exc}; {_REMEDY}") from None


def _known_model(name: str) -> ModelShape:
    if name not in MODELS:
        raise ConfigError(f"--model={name!r} is unknown: use one of {', '.join(MODELS)}")
    return MODELS[name]


def _gpu(path: Path, model: ModelConfig) -> str:
    name = gpu_named(model.resources.accelerator_type or "")
    if name is not None:
        return name
    raise ConfigError(
        f"{path}: models[{model.id}].resources.accelerator_type={model.resources.accelerator_type!r} is no GPU that "
        f"can be simulated: add --gpu with one of {', '.join(GPUS)}"
    )


def _of_trtllm(engine: TrtllmSettings, latency: RooflineSettings) -> SimulatedSettings:
    cache = engine.kv_cache
    changes: dict[str, Any] = {"kv_fraction": cache.memory_fraction, "attention_dp": engine.attention_dp.enabled}
    if cache.dtype != "auto":
        changes["kv_cache"] = _KV_PRECISION[cache.dtype]
    return SimulatedSettings(
        context_tokens=engine.context_tokens or latency.shape.context_tokens,
        tokens_per_block=cache.tokens_per_block,
        total_blocks=None if cache.max_tokens is None else max(1, cache.max_tokens // cache.tokens_per_block),
        share_prefixes=cache.block_reuse,
        scheduling="max_utilization" if engine.scheduler.capacity == "max_utilization" else "guaranteed_no_evict",
        max_batch_size=engine.max_batch_size or SimulatedSettings.model_fields["max_batch_size"].default,
        max_num_tokens=engine.max_num_tokens or SimulatedSettings.model_fields["max_num_tokens"].default,
        chunked_prefill=engine.chunked_prefill,
        max_waiting=engine.max_waiting,
        latency=_roofline(latency, changes),
    )


def _of_transformers(engine: TransformersSettings, latency: RooflineSettings) -> SimulatedSettings:
    size, tokens = engine.tokens_per_block, engine.kv_cache_tokens
    return SimulatedSettings(
        context_tokens=engine.context_tokens or latency.shape.context_tokens,
        tokens_per_block=size,
        total_blocks=None if tokens is None else max(1, tokens // size),
        share_prefixes=engine.prefix_sharing,
        max_batch_size=engine.max_batch_size,
        max_num_tokens=engine.max_num_tokens or 4096,
        max_waiting=engine.max_waiting,
        latency=_roofline(latency, {"kv_cache": "bf16", "kv_fraction": engine.kv_cache_fraction}),
    )


def _roofline(latency: RooflineSettings, changes: dict[str, Any]) -> RooflineSettings:
    return RooflineSettings.model_validate({**dict(latency), **changes})


def _override(deployment: SimDeployment, overrides: Overrides) -> SimDeployment:
    """Apply what the command line says.

    Raises:
        ConfigError: It does not go together.
    """
    engine, gpus = deployment.engine, deployment.gpus_per_replica
    latency = {
        "model": overrides.model,
        "gpu": overrides.gpu,
        "tensor_parallel": overrides.tensor_parallel,
        "weights": overrides.weights,
        "kv_cache": overrides.kv_cache,
    }
    changes = {name: value for name, value in latency.items() if value is not None}
    if changes and isinstance(engine.latency, FixedLatencySettings):
        raise ConfigError(f"--{next(iter(changes)).replace('_', '-')} has no effect on a latency model of fixed rates")
    try:
        settings = engine.model_dump()
        if isinstance(engine.latency, RooflineSettings) and changes:
            settings["latency"] = {**engine.latency.model_dump(), **changes}
            gpus = overrides.tensor_parallel or gpus
            if overrides.model is not None:
                settings["context_tokens"] = _known_model(overrides.model).context_tokens
        engine = SimulatedSettings.model_validate({**settings, **_sizes(engine, overrides)})
        if overrides.cache_fraction is not None:
            blocks = max(1, int(engine.make_limits().total_blocks * overrides.cache_fraction))
            engine = engine.model_copy(update={"total_blocks": blocks})
    except ValidationError as exc:
        raise ConfigError(describe_mistakes(exc, "engine as simulated: ")) from None
    return replace(deployment, engine=engine, gpus_per_replica=gpus)


def _sizes(engine: SimulatedSettings, overrides: Overrides) -> dict[str, int]:
    sizes = {
        "tokens_per_block": overrides.tokens_per_block,
        "total_blocks": overrides.cache_blocks,
        "max_batch_size": overrides.max_batch_size,
        "max_num_tokens": overrides.max_num_tokens,
    }
    changes = {name: value for name, value in sizes.items() if value is not None}
    if "tokens_per_block" in changes and engine.total_blocks is not None and "total_blocks" not in changes:
        # The same memory, in blocks of another size.
        changes["total_blocks"] = max(1, engine.total_blocks * engine.tokens_per_block // changes["tokens_per_block"])
    return changes
