"""GatewayPeers: the other gateways, asked for what they know of a request's routing."""

import asyncio
import logging
from collections.abc import Iterable

import msgspec
from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from serve.router.records import RouteRecord

logger = logging.getLogger(__name__)

TIMEOUT_S = 2.0  # somebody waits for the answer; a gateway that is this slow is not asked for its memories

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[RouteRecord])


def encode_records(records: Iterable[RouteRecord]) -> bytes:
    """Return records as one gateway tells them to another."""
    return _encoder.encode(list(records))


class GatewayPeers:
    """All gateways of an application, this one included.

    Args:
        app_name: The Serve application.
        deployment: Name of the gateways' deployment.
    """

    def __init__(self, app_name: str, deployment: str) -> None:
        self._app_name = app_name
        self._deployment = deployment
        self._handle: DeploymentHandle | None = None

    async def ask(self, request_id: str) -> list[RouteRecord]:
        """Return what any gateway knows of a request; what one that does not answer knows is missing."""
        if self._handle is None:  # made when it is needed: a handle costs a long poll of Serve's controller
            self._handle = ray_serve.get_deployment_handle(self._deployment, self._app_name)
            self._handle._init(_run_router_in_separate_loop=False)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                response = self._handle.broadcast("routing_records", request_id)
                answers = await response.results_async(timeout_s=TIMEOUT_S, return_exceptions=True)
            return [record for answer in answers if isinstance(answer, bytes) for record in _decoder.decode(answer)]
        except Exception as exc:  # whatever it is, the answer is that nothing is known
            logger.warning("The other gateways could not be asked for request %s: %s", request_id, exc)
            return []
