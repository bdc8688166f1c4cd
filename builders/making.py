"""The making of a bundle: the graph of its build, from what a node tells, and the steps that are still to be done."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from builders.build import BuildOptions
from builders.context import StepName
from builders.display import BuildDisplay
from builders.graph import BuildFacts, BuildGraph, StepState, make_graph
from builders.inputs import BuildInputs
from builders.records import check_refusal, find_records, find_refusal
from builders.source_check import check_source
from builders.target_probe import probe_target
from builders.texts.package import package_texts_digest
from serve.artifacts.manifest import Manifest
from serve.artifacts.node_facts import NodeFacts
from serve.artifacts.port import ArtifactStore
from serve.core.placement import PlacementError
from serve.errors import ConfigError

if TYPE_CHECKING:  # Ray takes a second to import
    from builders.ray_cluster import RayCluster


@dataclass(frozen=True)
class BuildOutline:
    """What a build would do.

    Attributes:
        graph: Its steps.
        states: What is to be done about each.
        seconds: How long those took whose output is there.
        refused: When the gate refused the candidate; None: it did not.
    """

    graph: BuildGraph
    states: Mapping[StepName, StepState]
    seconds: Mapping[StepName, float]
    refused: str | None


def outline(inputs: BuildInputs, store: ArtifactStore, address: str | None) -> BuildOutline:
    """Find out what a build would do, and do nothing.

    Args:
        inputs: The build.
        store: Where it would be published.
        address: Of the Ray cluster; None: this machine, whose Ray need not be started for it.

    Raises:
        ConfigError: It could not be done.
    """
    check_source(inputs)
    if address is None:
        graph = _graph(inputs, _probe_here(inputs))
    else:
        from builders.ray_cluster import connected

        with connected(address) as cluster:
            graph = _graph_there(inputs, cluster, None)
    records = find_records(store, graph)
    published = store.find_whole_bundle(graph.fingerprint) is not None
    refusal = None if published else find_refusal(store, graph)
    return BuildOutline(
        graph=graph,
        states=graph.states({record.fingerprint for record in records.values()}, published),
        seconds={name: record.seconds for name, record in records.items()},
        refused=refusal.created if refusal is not None else None,
    )


def make(
    inputs: BuildInputs, store: ArtifactStore, options: BuildOptions, display: BuildDisplay, replaces: str | None = None
) -> tuple[Manifest, bool]:
    """Make a bundle, as far as it is not there.

    Args:
        inputs: The build.
        store: Where it is published.
        options: How.
        display: Told what is done.
        replaces: Why this is built instead of something else; None: it is what was asked for.

    Returns:
        The bundle's manifest, and whether it was made just now.

    Raises:
        ConfigError: It cannot be made like this, or here; nothing was begun.
        BuildFailed: A step failed, or the gate refused; what was finished is kept.
    """
    check_source(inputs)
    local = None
    if options.address is None:
        # What is published, or was refused, is found without starting Ray.
        local = _graph(inputs, _probe_here(inputs))
        found = store.find_whole_bundle(local.fingerprint)
        if found is not None:
            return found, False
        if not options.retry:
            check_refusal(store, local)
        display.say("starting Ray on this machine")
    # Imported here: Ray takes a second, and a build that was done before does not need it.
    from builders.ray_cluster import connected
    from builders.runner import BuildRunner

    with connected(options.address) as cluster:
        graph = _graph_there(inputs, cluster, local)
        runner = BuildRunner(
            graph, inputs.user_files, store, display, options.retry, replaces=replaces, package=inputs.package
        )
        return asyncio.run(runner.run())


def _probe_here(inputs: BuildInputs) -> tuple[NodeFacts, NodeFacts]:
    target = inputs.spec.target
    facts = probe_target(target.engine_env)
    if target.accelerator is not None and not facts[0].gpus:
        raise ConfigError(
            f"target.accelerator: {target.accelerator!r}: this machine has no GPU that its driver knows; give "
            "--address of a Ray cluster that has such GPUs, or remove target.accelerator to build on the CPU"
        )
    return facts


def _graph_there(inputs: BuildInputs, cluster: "RayCluster", known: BuildGraph | None) -> BuildGraph:
    """Return the graph on a cluster, the known one if this machine is all of it, once its steps have room there."""
    cluster.check_accelerator(inputs.spec.target)
    graph = known or _graph(inputs, cluster.probe(inputs.spec.target))
    cluster.check(graph)
    return graph


def _graph(inputs: BuildInputs, facts: tuple[NodeFacts, NodeFacts]) -> BuildGraph:
    node, engine_node = facts
    try:
        return make_graph(
            inputs.spec,
            BuildFacts(inputs.source.digest, node, engine_node, inputs.code, package_texts_digest(), inputs.digests),
        )
    except PlacementError as exc:
        raise ConfigError(f"parallel: {exc}") from exc
