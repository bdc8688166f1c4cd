"""EngineReplica: the Serve deployment that owns one engine. Wires Serve's hooks to the engine port, decides nothing."""

import logging
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

import ray
from msgspec.structs import replace
from ray import serve as ray_serve
from ray.exceptions import RayActorError

from serve.artifacts.store import open_store
from serve.artifacts.use_keeper import UseKeeper
from serve.cluster_kv import ClusterKeyValues
from serve.core.request import GenerateRequest
from serve.datapath.frames import ReplyAddress
from serve.datapath.sender import DeltaSender, ReplyStream
from serve.errors import EngineDead, RayTRTError
from serve.logs import configure_logging
from serve.router.publisher import EventPublisher
from serve.start_notes import StartNotes
from serve.workers.bundle_access import ReplicaBundles
from serve.workers.groups import make_group
from serve.workers.launch import LaunchChain
from serve.workers.starting import EngineStart, Started

logger = logging.getLogger(__name__)


class EngineReplica:
    """One replica, one engine on all its ranks.

    Args:
        model_id: The model's id, for the log.
        chain: What may serve it, best first.
    """

    async def __init__(self, model_id: str, chain: LaunchChain) -> None:  # type: ignore[misc]  # Serve awaits it
        configure_logging()
        replica_id = ray_serve.get_replica_context().replica_id.to_full_id_str()
        self._uses = UseKeeper(open_store, f"replica {replica_id}", chain.bundle_check.lease_s)
        # The engine is made here: it owns threads, GPUs and processes, and cannot be pickled.
        started = await self._start(model_id, chain)
        self._group = started.group
        info = self._group.info
        self._fingerprint = started.bundle.fingerprint if started.bundle is not None else ""
        self._stand_in = started.describe(info.engine) if started.stands_in else ""
        self._sender = DeltaSender(replica_id)
        self._publisher = EventPublisher(replica_id, ray.util.get_node_ip_address(), self._group)
        await self._publisher.start()
        logger.info(
            "Serving %s with %s on %s: context %d tokens, %d KV blocks of %d tokens.",
            model_id,
            info.engine,
            info.device,
            info.context_tokens,
            info.total_blocks,
            info.tokens_per_block,
        )

    async def _start(self, model_id: str, chain: LaunchChain) -> Started:
        bundles = [launch.bundle for launch in chain.launches if launch.bundle is not None]
        if not bundles:
            return await EngineStart(model_id, chain, make_group).run()
        self._uses.start(bundles)
        replica = ray_serve.get_replica_context()
        notes = StartNotes(ClusterKeyValues(), replica.app_name, replica.deployment, replica.replica_id.unique_id)
        self._bundles = ReplicaBundles(notes)  # kept: the files stay on this node while it lives
        with notes.kept():
            try:
                started = await EngineStart(model_id, chain, make_group, self._bundles).run()
            finally:
                self._bundles.close()
        self._uses.start([started.launch.bundle] if started.launch.bundle is not None else [])
        return started

    async def generate(self, request: GenerateRequest) -> None:
        """Run one sequence; returns when its last delta is on the way to `request.reply_to`.

        Serve counts the call as ongoing for as long as the sequence lives, so that its limits, autoscaling and drain
        see it; cancelling the call cancels the sequence.
        """
        reply = await self._sender.open(ReplyAddress.from_text(request.reply_to))
        self._publisher.accepted(request)
        try:
            await self._stream(request, reply)
        except RayTRTError as exc:
            reply.send_error(exc)
        except Exception as exc:
            logger.exception("Sequence %s failed.", request.request_id)
            reply.send_error(EngineDead(f"internal error of the engine: {type(exc).__name__}"))
        finally:
            self._publisher.ended(request)

    async def _stream(self, request: GenerateRequest, reply: ReplyStream) -> None:
        # If this coroutine is cancelled, `async for` alone leaves the generator open and its KV blocks taken.
        async with aclosing(self._group.generate(request)) as deltas:
            async for delta in deltas:
                self._publisher.delta(request, delta)
                if reply.lost:
                    return  # the gateway is gone, and its clients with it
                if delta.prefill is not None and (self._stand_in or self._fingerprint):
                    prefill = replace(delta.prefill, fallback=self._stand_in, bundle=self._fingerprint)
                    delta = replace(delta, prefill=prefill)
                reply.send(delta)

    async def record_replica_metadata(self) -> dict[str, Any]:
        """Called by Serve, once: what gateways have to know to route to this replica."""
        return self._publisher.metadata()

    def stand_in(self) -> str:
        """Return what serves in the place of what was configured, an engine or a bundle; empty if that does."""
        return self._stand_in

    async def check_health(self) -> None:
        """Called by Serve. An engine that died has the replica replaced at once, and not after three failures.

        Raises:
            RayActorError: It died; nothing is left of it, and its GPUs' memory is free.
        """
        try:
            self._group.check_health()
        except EngineDead as exc:
            await self._group.wait_until_stopped()
            # Serve takes this for the crash of the replica itself, which it will not wait for.
            raise RayActorError(error_msg=f"the engine died: {exc}") from None

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve, for autoscaling policies: the engine's load."""
        return {name: float(value) for name, value in asdict(self._group.stats()).items()}

    async def __del__(self) -> None:
        # Serve awaits the destructor when the replica has drained.
        if hasattr(self, "_publisher"):
            await self._publisher.stop()
        if hasattr(self, "_group"):
            await self._group.stop()
        if hasattr(self, "_sender"):
            self._sender.close()
        if hasattr(self, "_uses"):
            self._uses.stop()
