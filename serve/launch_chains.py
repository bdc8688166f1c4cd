"""From a resolved model to the chain of launches of its replicas, all of which fit into what a replica reserves."""

import logging

import ray

from serve.bundle_models import ResolvedModel, fallback_checkpoint
from serve.core.placement import PlacementError, PlacementPlan, check_feasible
from serve.errors import ConfigError
from serve.workers.cluster import cluster_grows, mpi_works_in_cluster
from serve.workers.launch import EngineLaunch, LaunchChain, fallback_launch, plan_launch
from serve.workers.nodes import living_nodes

logger = logging.getLogger(__name__)


def make_chain(model: ResolvedModel) -> LaunchChain:
    """Decide how a model's ranks are started and placed, and check that the cluster has room for one replica.

    Raises:
        ConfigError: It never could, as it is now.
    """
    config = model.config
    first = _launch(model)
    launches = [first]
    if model.before is not None and (before := _launch_before(model.before, first)) is not None:
        launches.append(before)
    if config.fallback is not None:
        checkpoint = None if model.bundle is None else fallback_checkpoint(config, model.bundle.manifest)
        launches.append(fallback_launch(first, config.fallback, checkpoint))
    return LaunchChain(tuple(launches), config.max_start_failures, config.bundle_check)


def _launch(model: ResolvedModel) -> EngineLaunch:
    config = model.config
    try:
        plan = plan_launch(
            config.engine,
            config.parallel,
            config.resources,
            mpi_works=lambda: mpi_works_in_cluster(config.engine_env),
            model_dir=config.directory if model.bundle is None else None,  # a bundle's settings say what it holds
            # An engine that failed leaves traces in its process, which must not be the one that serves instead.
            own_process=config.engine_env is not None or config.fallback is not None,
        )
        if ray.is_initialized() and not cluster_grows():
            check_feasible(plan, tuple(living_nodes().values()))
    except PlacementError as exc:
        raise ConfigError(f"models[{config.id}].parallel: {exc}") from None
    except ConfigError as exc:
        raise ConfigError(f"models[{config.id}]: {exc}") from None
    directory = str(config.directory) if model.bundle is None else ""
    return EngineLaunch(config.engine, directory, plan, config.engine_env, config.watch, model.bundle)


def _launch_before(before: ResolvedModel, first: EngineLaunch) -> EngineLaunch | None:
    """Return the launch of an earlier bundle, if it fits into what was reserved for the new one."""
    try:
        launch = _launch(before)
    except ConfigError as exc:
        why = str(exc)
    else:
        if _reserved(launch.plan) == _reserved(first.plan):
            return launch
        why = "it takes other resources than what replicas reserve now; `raytrt deploy` goes back to it"
    logger.warning(
        "%s: bundle %s cannot take over in replicas of %s: %s", before.config.id, before.bundle, first.bundle, why
    )
    return None


def _reserved(plan: PlacementPlan) -> tuple[object, ...]:
    return plan.bundles, plan.strategy, plan.replica
