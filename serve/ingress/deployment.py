"""Gateway: the Serve ingress deployment. Wires the HTTP API to Serve's handles, decides nothing."""

import asyncio
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from serve.artifacts.bundle_source import BundleSource
from serve.artifacts.manifest import TOKENIZER
from serve.artifacts.node_cache import NodeCache
from serve.artifacts.store import open_store
from serve.artifacts.use_keeper import UseKeeper
from serve.core.routing.settings import RoutingSettings, ServeRouterSettings
from serve.core.strict_model import describe_mistakes
from serve.datapath.listener import DeltaListener
from serve.errors import ConfigError
from serve.flags import missing_flags
from serve.ingress.api import make_app
from serve.ingress.exchange import Message, Receive, Scope, Send
from serve.ingress.gateway_peers import GatewayPeers, encode_records
from serve.ingress.models import ServedModel, load_model
from serve.ingress.routing_desk import RoutingDesk
from serve.ingress.serve_backend import ServeBackend
from serve.ingress.settings import GatewaySettings
from serve.logs import configure_logging
from serve.router import registry
from serve.router.board import RoutingBoard
from serve.router.subscriber import make_feeds

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GatewayModel:
    """What a gateway has to know of a model's configuration.

    Attributes:
        id: What clients call it.
        directory: Its tokenizer's directory; of a bundle: empty, as it is downloaded.
        deployment_name: Its Serve deployment.
        context_limit: Tokens that its engine takes, if its settings say so.
        routing: How its replicas are chosen.
        has_stand_in: Whether something else than what was configured may serve it.
        bundle: What it is served from; None: a checkpoint.
        used_bundles: Bundles that its replicas may load, also while there are none.
        lease_s: How long the store keeps these after the gateway has gone.
    """

    id: str
    directory: str
    deployment_name: str
    context_limit: int | None
    routing: RoutingSettings
    has_stand_in: bool = False
    bundle: BundleSource | None = None
    used_bundles: tuple[BundleSource, ...] = ()
    lease_s: float = 3600.0


@ray_serve.ingress()
class Gateway:
    """One process of the OpenAI-compatible HTTP API.

    Args:
        models: Every model.
        handles: Model id to its deployment.
        limits: What applies until `user_config` says otherwise.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        models: Sequence[GatewayModel],
        handles: Mapping[str, DeploymentHandle],
        limits: GatewaySettings,
    ) -> None:
        configure_logging()
        sys.setswitchinterval(0.001)  # a thread that renders or tokenizes a long prompt yields to the streams sooner
        self._configured = limits
        self._settings: GatewaySettings | None = None
        replica = ray_serve.get_replica_context()
        self._uses = self._keep_bundles(models, f"gateway {replica.replica_id.to_full_id_str()}")
        self._models = [await asyncio.to_thread(_load, model) for model in models]
        self._listener = DeltaListener(ray.util.get_node_ip_address())
        await self._listener.start()
        self._boards = _make_boards(replica.app_name, models)
        self._peers = GatewayPeers(replica.app_name, replica.deployment)
        self._desk = RoutingDesk(self._boards, self._limits, replica.replica_id.unique_id, self._peers.ask)
        deployments = {model.id: model.deployment_name for model in models}
        with_stand_in = [model.id for model in models if model.has_stand_in]
        self._backend = ServeBackend(handles, deployments, replica.app_name, self._listener, self._desk, with_stand_in)
        if missing := missing_flags():
            logger.warning(
                "Running without %s: streaming costs several times more CPU. Start Ray with `raytrt up`, or put "
                'the output of `raytrt env` into its environment first: eval "$(raytrt env)".',
                ", ".join(missing),
            )

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Serve with the deployment's `user_config`, live: fields of GatewaySettings; the rest as configured.

        Raises:
            ConfigError: An unknown key or a bad value at the start. Later that is logged, and the settings stay as
                they were: Serve would answer an exception by replacing a gateway full of streams.
        """
        try:
            settings = GatewaySettings.model_validate(self._configured.model_dump() | (user_config or {}))
        except ValidationError as exc:
            message = describe_mistakes(exc, "deployments[gateway].user_config")
            if self._settings is None:
                raise ConfigError(message) from None
            logger.error("The settings stay as they were: %s", message)
            return
        if self._settings is not None and settings != self._settings:
            logger.info("New settings: %s", user_config)
        self._settings = settings

    def _keep_bundles(self, models: Sequence[GatewayModel], holder: str) -> list[UseKeeper]:
        """Say that bundles are used, also those of models that have no replica now."""
        keepers = []
        for model in models:
            keepers.append(UseKeeper(open_store, holder, model.lease_s))
            keepers[-1].start(model.used_bundles)
        return keepers

    def _limits(self) -> GatewaySettings:
        return self._settings or self._configured

    async def routing_records(self, request_id: str) -> bytes:
        """Called by other gateways: what this one knows of the sequences of a request, as `encode_records` has it."""
        return encode_records(self._desk.local_records(request_id))

    def __serve_build_asgi_app__(self) -> Any:
        app = make_app(self._models, self._backend, self._limits, logger)

        async def without_request_id(scope: Scope, receive: Receive, send: Send) -> None:
            async def send_head(message: Message) -> None:
                if message["type"] == "http.response.start":  # Serve adds x-request-id itself
                    message["headers"] = [header for header in message["headers"] if header[0] != b"x-request-id"]
                await send(message)

            await app(scope, receive, send_head)

        return without_request_id

    async def __del__(self) -> None:
        for keeper in getattr(self, "_uses", ()):
            keeper.stop()
        if hasattr(self, "_backend"):
            self._backend.close()
        if hasattr(self, "_desk"):
            await self._desk.close()
            for board in self._boards.values():
                board.roster.feeds.close()
        if hasattr(self, "_listener"):
            await self._listener.close()


def _load(model: GatewayModel) -> ServedModel:
    routing, bundle, directory = model.routing, model.bundle, Path(model.directory)
    if bundle is not None:
        directory = NodeCache().fetch(open_store(bundle.store), bundle.manifest, only=[TOKENIZER]) / TOKENIZER
    return load_model(
        model.id,
        directory,
        context_tokens=model.context_limit,
        session_header=routing.session_header,
        tenant_header=routing.tenant_header,
        priority_header=routing.priority_header,
        bundle="" if bundle is None else bundle.fingerprint,
    )


def _make_boards(app_name: str, models: Sequence[GatewayModel]) -> dict[str, RoutingBoard]:
    """Return a board for each model that we route, where Serve's router will find it."""
    boards = {}
    for model in models:
        if not isinstance(model.routing, ServeRouterSettings):
            boards[model.id] = RoutingBoard(model.id, model.routing, make_feeds)
            registry.register(app_name, model.deployment_name, boards[model.id])
    return boards
