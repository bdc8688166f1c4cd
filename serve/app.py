"""Composition root: configuration in, bound Serve application out. `import_path: serve.app:build_app`."""

from typing import Any

from ray import serve as ray_serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import LoggingConfig

from serve.config import AppConfig, ModelConfig, parse_app_config
from serve.engines.factory import context_limit
from serve.ingress.deployment import Gateway, GatewayModel
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
    config = parse_app_config(args)
    for model in config.models:
        model.check_files()
    return _bind_gateway(config)


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
            GatewayModel(model.id, str(model.directory), model.deployment_name, context_limit(model.engine))
            for model in config.models
        ],
        handles={model.id: _bind_model(model) for model in config.models},
        limits=gateway.limits,
    )


def _bind_model(model: ModelConfig) -> Application:
    limits = model.limits
    scale: dict[str, Any] = {"num_replicas": model.replicas or 1}
    if model.autoscaling is not None:
        scale = {"autoscaling_config": AutoscalingConfig(**model.autoscaling.model_dump())}
    deployment = ray_serve.deployment(
        EngineReplica,
        name=model.deployment_name,
        ray_actor_options=model.resources.to_ray_actor_options(),
        max_ongoing_requests=limits.max_ongoing_requests,
        max_queued_requests=limits.max_queued_requests,
        health_check_period_s=limits.health_check_period_s,
        health_check_timeout_s=limits.health_check_timeout_s,
        graceful_shutdown_timeout_s=limits.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=QUIET,
        **scale,
    )
    return deployment.bind(model_id=model.id, model_dir=str(model.directory), engine=model.engine)
