"""RayCluster: the Ray that a build runs on; one that runs already, or one of its own on this machine."""

import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import grpc
import ray
from ray.exceptions import RayError, RayTaskError

from builders.cluster_room import check_accelerator, check_room
from builders.graph import BuildGraph
from builders.settings.target import TargetSettings
from builders.tasks import probe_there
from serve.artifacts.node_facts import NodeFacts
from serve.core.resources import ACCELERATOR
from serve.errors import ConfigError
from serve.workers.cluster import cluster_grows
from serve.workers.nodes import living_nodes

_OBJECT_STORE_BYTES = 256 * 2**20  # a build's values are small: files go through the store
# gRPC would report every process that a step starts as a fork that it had to look past.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "GRPC_ENABLE_FORK_SUPPORT": "0"}
_ANSWER_S = 10.0  # Ray itself would try for three minutes and more, and say nothing
_PATIENT = {"RAY_raylet_start_wait_time_s": "180"}  # a busy machine may need more than Ray's 30 s


@dataclass(frozen=True)
class RayCluster:
    """A cluster that this process is connected to."""

    def probe(self, target: TargetSettings) -> tuple[NodeFacts, NodeFacts]:
        """Ask a node of the target for its facts; see `probe_target`.

        Raises:
            ConfigError: It has no such environment as the target names.
        """
        options: dict[str, Any] = {}
        if target.accelerator is not None:
            options["resources"] = {f"{ACCELERATOR}{target.accelerator}": 0.001}
        try:
            release, facts = ray.get(probe_there.options(**options).remote(target.engine_env))
        except RayTaskError as exc:
            if isinstance(exc.cause, ConfigError):
                raise exc.cause from exc
            raise ConfigError(
                f"target: its nodes cannot be asked what they have ({exc.cause}); is the same release of raytrt "
                "installed on every node?"
            ) from exc
        except RayError as exc:
            raise ConfigError(f"target: its nodes cannot be asked what they have: {exc}") from exc
        if release != version("raytrt"):
            raise ConfigError(
                f"target: its nodes have raytrt {release}, and this is {version('raytrt')}; install the same release "
                "everywhere"
            )
        found: tuple[NodeFacts, NodeFacts] = facts
        return found

    def check(self, graph: BuildGraph) -> None:
        """Check that the steps have room here, now or once the cluster has grown.

        Raises:
            ConfigError: They never will; lists what there is.
        """
        if not cluster_grows():
            check_room(graph, tuple(living_nodes().values()))

    def check_accelerator(self, target: TargetSettings) -> None:
        """Check that there are nodes of the target.

        Raises:
            ConfigError: There are none; lists what there is.
        """
        if not cluster_grows():
            check_accelerator(target, tuple(living_nodes().values()))


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[RayCluster]:
    """Join a cluster, or start Ray here, and end it afterwards. A Ray that this process has joined already is left.

    Args:
        address: Of the cluster; None: start one.

    Raises:
        ConfigError: There is no cluster at the address.
    """
    if ray.is_initialized():
        yield RayCluster()
        return
    if address is not None:
        _check_answers(address)
    for name, value in {**_QUIET, **_PATIENT}.items():
        os.environ.setdefault(name, value)
    at_term = signal.getsignal(signal.SIGTERM)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    try:
        if address is None:
            # By name: without one, Ray would join whatever cluster happens to run on this machine.
            ray.init("local", include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **quiet)
        else:
            ray.init(address, **quiet)
    except Exception as exc:  # Ray raises bare ones, for instance when its processes are not up in time
        ray.shutdown()
        remedy = "" if address else "; is the machine very busy, or /tmp full? Try again, or give --address"
        where = f"--address: {address!r} cannot be joined" if address else "Ray cannot be started here"
        raise ConfigError(f"{where}: {(str(exc) or repr(exc)).splitlines()[0]}{remedy}") from exc
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, at_term)  # Ray takes it
    try:
        yield RayCluster()
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Check that something speaks gRPC at an address, as the head of a cluster does.

    Raises:
        ConfigError: Nothing does.
    """
    host = address.removeprefix("ray://")
    if address == "auto" or os.environ.get("RAY_USE_TLS", "0") in ("1", "true"):
        return  # Ray looks for it; or it needs Ray's certificates
    # Like Ray's own connections, past any HTTP proxy of the environment.
    with grpc.insecure_channel(host, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(_ANSWER_S)
        except grpc.FutureTimeoutError:
            raise ConfigError(
                f"--address: no Ray cluster answers at {address!r}; give the host and port of its head node, as "
                "`ray start --head` printed them (6379 if nothing else was asked for; 8265 is the dashboard's)"
            ) from None
