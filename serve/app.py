"""Composition root: configuration in, bound Serve application out. `import_path: serve.app:build_app`."""

import logging
from collections.abc import Sequence
from typing import Any

import ray
from ray import serve as ray_serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from serve import build_report
from serve.artifacts.store import open_store
from serve.bundle_models import ResolvedModel, resolve_model
from serve.config import GatewayConfig, ModelConfig, parse_app_config
from serve.core.parallel import ParallelLayout
from serve.core.placement import PlacementPlan, actor_options, plan_placement
from serve.core.routing.settings import ServeRouterSettings
from serve.engines.factory import context_limit
from serve.errors import ConfigError
from serve.ingress.deployment import Gateway, GatewayModel
from serve.launch_chains import make_chain
from serve.router.replica_router import router_config
from serve.workers.cluster import has_room
from serve.workers.launch import LaunchChain
from serve.workers.replica import EngineReplica

logger = logging.getLogger(__name__)

GATEWAY = "gateway"
SURGE_PERCENT = 25
# A line for each request and each sequence would cost more than routing it; /metrics counts them. Our own lines do not
# pass through Serve's logger.
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


def build_app(args: dict[str, Any]) -> Application:
    """Build the application: one gateway deployment in front of one deployment for each model.

    Args:
        args: `AppConfig` as a dict; empty serves the built-in quickstart model.

    Raises:
        ConfigError: A mistake in `args`, a model whose files are missing, or a bundle that is not in its store.
    """
    try:
        config = parse_app_config(args)
        for model in config.models:
            model.check_files()
        models = [resolve_model(model, open_store) for model in config.models]
        return _bind_gateway(config.gateway, models)
    except ConfigError as exc:
        build_report.report(exc)
        raise


def _bind_gateway(gateway: GatewayConfig, models: Sequence[ResolvedModel]) -> Application:
    chains = {model.config.id: make_chain(model) for model in models}
    deployment = ray_serve.deployment(
        Gateway,
        name=GATEWAY,
        num_replicas=gateway.replicas,
        ray_actor_options={"num_cpus": gateway.num_cpus},
        max_ongoing_requests=gateway.max_ongoing_requests,
        graceful_shutdown_timeout_s=gateway.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2.0,
        max_surge_percent=_gateway_surge_percent(gateway),
        logging_config=QUIET,
        user_config={},
    )
    return deployment.bind(
        models=[_gateway_model(model, chains[model.config.id]) for model in models],
        handles={model.config.id: _bind_model(model.config, chains[model.config.id]) for model in models},
        limits=gateway.limits,
    )


def _gateway_surge_percent(gateway: GatewayConfig) -> int:
    """Return how many more gateways a rolling update may have: twice as many, so that one always holds the requests."""
    one = plan_placement(ParallelLayout(), "in_process", replica={}, rank={"CPU": gateway.num_cpus})
    if not ray.is_initialized() or has_room(one):
        return 100
    logger.warning(
        "No node has %g CPU cores left for another gateway: a rolling update stops gateways before it starts new ones, "
        "and with gateway.replicas=%d clients %s. Lower gateway.num_cpus, or leave cores free.",
        gateway.num_cpus,
        gateway.replicas,
        "are refused meanwhile" if gateway.replicas == 1 else "have fewer of them meanwhile",
    )
    return 0


def _gateway_model(model: ResolvedModel, chain: LaunchChain) -> GatewayModel:
    config = model.config
    return GatewayModel(
        config.id,
        "" if model.bundle is not None else str(config.tokenizer_directory),
        config.deployment_name,
        context_limit(config.engine),
        config.routing,
        has_stand_in=len(chain.launches) > 1 or model.stands_in,
        bundle=model.bundle,
        used_bundles=tuple(launch.bundle for launch in chain.launches if launch.bundle is not None),
        lease_s=config.bundle_check.lease_s,
    )


def _bind_model(model: ModelConfig, chain: LaunchChain) -> Application:
    limits, plan = model.limits, chain.launches[0].plan
    surge = limits.surge_percent
    if surge is None:
        surge = SURGE_PERCENT if has_room(plan) else 0
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
        max_surge_percent=surge,
        request_router_config=_router_config(model),
        **_placement_options(plan),
        **scale,
    )
    return deployment.bind(model_id=model.id, chain=chain)


def _router_config(model: ModelConfig) -> RequestRouterConfig:
    if isinstance(model.routing, ServeRouterSettings):
        return RequestRouterConfig()
    return RequestRouterConfig(**router_config(model.deployment_name, model.id, model.routing.model_dump(mode="json")))


def _placement_options(plan: PlacementPlan) -> dict[str, Any]:
    """Return where a replica goes; one that is all of its plan needs no placement group."""
    if len(plan.bundles) == 1:
        return {"ray_actor_options": actor_options(plan.bundles[0])}
    return plan.serve_options()
