"""Composition root: configuration in, bound Serve application out. `import_path: serve.app:build_app`."""

from typing import Any

import ray
from ray import serve as ray_serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from serve import build_report
from serve.config import AppConfig, ModelConfig, parse_app_config
from serve.core.placement import PlacementError, PlacementPlan, actor_options, check_feasible
from serve.core.routing.settings import ServeRouterSettings
from serve.engines.factory import context_limit
from serve.errors import ConfigError
from serve.ingress.deployment import Gateway, GatewayModel
from serve.router.replica_router import router_config
from serve.workers.cluster import cluster_grows, mpi_works_in_cluster
from serve.workers.launch import EngineLaunch, fallback_launch, plan_launch
from serve.workers.nodes import living_nodes
from serve.workers.replica import EngineReplica

GATEWAY = "gateway"
# A line for each request and each sequence would cost more than routing it; /metrics counts them. Our own lines do not
# pass through Serve's logger.
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


def build_app(args: dict[str, Any]) -> Application:
    """Build the application: one gateway deployment in front of one deployment for each model.

    Args:
        args: `AppConfig` as a dict; empty serves the built-in quickstart model.

    Raises:
        ConfigError: A mistake in `args`, or a model whose files are missing.
    """
    try:
        config = parse_app_config(args)
        for model in config.models:
            model.check_files()
        return _bind_gateway(config)
    except ConfigError as exc:
        build_report.report(exc)
        raise


def _bind_gateway(config: AppConfig) -> Application:
    gateway = config.gateway
    deployment = ray_serve.deployment(
        Gateway,
        name=GATEWAY,
        num_replicas=gateway.replicas,
        ray_actor_options={"num_cpus": gateway.num_cpus},
        max_ongoing_requests=gateway.max_ongoing_requests,
        graceful_shutdown_timeout_s=gateway.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2.0,
        logging_config=QUIET,
        user_config={},
    )
    return deployment.bind(
        models=[
            GatewayModel(
                model.id,
                str(model.tokenizer_directory),
                model.deployment_name,
                context_limit(model.engine),
                model.routing,
                has_fallback=model.fallback is not None,
            )
            for model in config.models
        ],
        handles={model.id: _bind_model(model) for model in config.models},
        limits=gateway.limits,
    )


def _bind_model(model: ModelConfig) -> Application:
    limits = model.limits
    launch = _plan(model)
    scale: dict[str, Any] = {"num_replicas": model.replicas or 1}
    if model.autoscaling is not None:
        scale = {"autoscaling_config": AutoscalingConfig(**model.autoscaling.model_dump())}
    deployment = ray_serve.deployment(
        EngineReplica,
        name=model.deployment_name,
        max_ongoing_requests=limits.max_ongoing_requests,
        max_queued_requests=limits.max_queued_requests,
        health_check_period_s=limits.health_check_period_s,
        health_check_timeout_s=limits.health_check_timeout_s,
        graceful_shutdown_timeout_s=limits.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=QUIET,
        request_router_config=_router_config(model),
        **_placement_options(launch.plan),
        **scale,
    )
    fallback = fallback_launch(launch, model.fallback) if model.fallback is not None else None
    return deployment.bind(
        model_id=model.id, launch=launch, fallback=fallback, max_start_failures=model.max_start_failures
    )


def _router_config(model: ModelConfig) -> RequestRouterConfig:
    if isinstance(model.routing, ServeRouterSettings):
        return RequestRouterConfig()
    return RequestRouterConfig(**router_config(model.deployment_name, model.id, model.routing.model_dump(mode="json")))


def _plan(model: ModelConfig) -> EngineLaunch:
    """Decide how a model's ranks are started and placed, and check that the cluster has room for one replica.

    Raises:
        ConfigError: It never could, as it is now.
    """
    try:
        plan = plan_launch(
            model.engine,
            model.parallel,
            model.resources,
            mpi_works=lambda: mpi_works_in_cluster(model.engine_env),
            model_dir=model.directory,
            # An engine that failed leaves traces in its process, which must not be the one that serves instead.
            own_process=model.engine_env is not None or model.fallback is not None,
        )
        if ray.is_initialized() and not cluster_grows():
            check_feasible(plan, tuple(living_nodes().values()))
    except PlacementError as exc:
        raise ConfigError(f"models[{model.id}].parallel: {exc}") from None
    except ConfigError as exc:
        raise ConfigError(f"models[{model.id}]: {exc}") from None
    return EngineLaunch(model.engine, str(model.directory), plan, model.engine_env, model.watch)


def _placement_options(plan: PlacementPlan) -> dict[str, Any]:
    """Return where a replica goes; one that is all of its plan needs no placement group."""
    if len(plan.bundles) == 1:
        return {"ray_actor_options": actor_options(plan.bundles[0])}
    return plan.serve_options()
