"""EngineReplica: the Serve deployment that owns one engine. Wires Serve's hooks to the engine port, decides nothing."""

import logging
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path

from ray import serve as ray_serve

from serve.core.request import GenerateRequest
from serve.datapath.frames import ReplyAddress
from serve.datapath.sender import DeltaSender, ReplyStream
from serve.engines.factory import AnyEngineSettings, make_engine
from serve.engines.protocol import Engine
from serve.errors import EngineDead, RayTRTError
from serve.logs import configure_logging

logger = logging.getLogger(__name__)


class EngineReplica:
    """One replica, one engine.

    Args:
        model_id: The model's id, for the log.
        model_dir: Its checkpoint directory on this node.
        engine: Which engine, and its settings.
    """

    async def __init__(self, model_id: str, model_dir: str, engine: AnyEngineSettings) -> None:  # type: ignore[misc]
        configure_logging()
        # Serve awaits __init__. The engine is made here: it owns threads and GPUs, and cannot be pickled.
        self._engine: Engine = make_engine(engine, Path(model_dir))
        self._sender = DeltaSender(ray_serve.get_replica_context().replica_id.to_full_id_str())
        try:
            await self._engine.start()
        except Exception as exc:
            # Serve tells this to its controller's log and tries again; say it where the operator looks.
            logger.error("%s does not start: %s", model_id, exc)
            raise
        info = self._engine.info
        logger.info(
            "Serving %s with %s on %s: context %d tokens, %d KV blocks of %d tokens.",
            model_id,
            info.engine,
            info.device,
            info.context_tokens,
            info.total_blocks,
            info.tokens_per_block,
        )

    async def generate(self, request: GenerateRequest) -> None:
        """Run one sequence; returns when its last delta is on the way to `request.reply_to`.

        Serve counts the call as ongoing for as long as the sequence lives, so that its limits, autoscaling and drain
        see it; cancelling the call cancels the sequence.
        """
        reply = await self._sender.open(ReplyAddress.from_text(request.reply_to))
        try:
            await self._stream(request, reply)
        except RayTRTError as exc:
            reply.send_error(exc)
        except Exception as exc:
            logger.exception("Sequence %s failed.", request.request_id)
            reply.send_error(EngineDead(f"internal error of the engine: {type(exc).__name__}"))

    async def _stream(self, request: GenerateRequest, reply: ReplyStream) -> None:
        # If this coroutine is cancelled, `async for` alone leaves the generator open and its KV blocks taken.
        async with aclosing(self._engine.generate(request)) as deltas:
            async for delta in deltas:
                if reply.lost:
                    return  # the gateway is gone, and its clients with it
                reply.send(delta)

    def check_health(self) -> None:
        """Called by Serve; raising three times in a row has the replica replaced."""
        self._engine.check_health()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve, for autoscaling policies: the engine's load."""
        return {name: float(value) for name, value in asdict(self._engine.stats()).items()}

    async def __del__(self) -> None:
        # Serve awaits the destructor when the replica has drained.
        if hasattr(self, "_engine"):
            await self._engine.stop()
        if hasattr(self, "_sender"):
            self._sender.close()
