"""make_app: the gateway's HTTP API as an ASGI application, over a `Backend`."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence

from serve.ingress.api_error import ApiError, from_exception, internal_error, printable
from serve.ingress.backend import Backend
from serve.ingress.debug_routes import REQUESTS_PREFIX, DebugRoutes
from serve.ingress.exchange import ClientGone, Exchange, Handler, Receive, Scope, Send
from serve.ingress.generation import Generation
from serve.ingress.generation_routes import GenerationRoutes
from serve.ingress.job_maker import JobMaker
from serve.ingress.metrics import GatewayMetrics
from serve.ingress.models import ServedModel
from serve.ingress.operator_routes import OperatorRoutes
from serve.ingress.schema import openapi_document
from serve.ingress.settings import GatewaySettings
from serve.ingress.text_routes import TextRoutes
from serve.ingress.text_work import TextWork

_LOGGER = logging.getLogger("raytrt.gateway")

Routes = dict[str, dict[str, Handler]]

CLIENT_CLOSED_REQUEST = 499  # nginx's number, for metrics; nobody is there to receive it
_MODEL_PREFIX = "/v1/models/"


def make_app(
    models: Sequence[ServedModel],
    backend: Backend,
    settings: Callable[[], GatewaySettings] = GatewaySettings,
    logger: logging.Logger = _LOGGER,
) -> "GatewayApp":
    """Make the gateway's ASGI application. It belongs to one event loop.

    Args:
        models: What is served; ids are unique.
        backend: Carries sequences to replicas.
        settings: Returns the settings in force; asked for each request.
        logger: Gets one line for each request that fails.
    """
    by_id = {model.id: model for model in models}
    metrics, work = GatewayMetrics(by_id, backend.fallbacks, backend.desk), TextWork()
    jobs = JobMaker(work)
    generation = GenerationRoutes(by_id, Generation(backend, work), jobs, metrics, settings, backend.fallbacks)
    debug = DebugRoutes(by_id, jobs, backend.desk, settings)
    operator = OperatorRoutes(by_id, backend, metrics)
    text = TextRoutes(by_id, work, settings)
    document = operator.document(openapi_document(list(by_id)))
    routes: Routes = {
        "/v1/chat/completions": {"POST": generation.chat},
        "/v1/completions": {"POST": generation.complete},
        "/v1/models": {"GET": operator.models},
        "/health": {"GET": operator.health},
        "/ready": {"GET": operator.ready},
        "/version": {"GET": operator.version},
        "/metrics": {"GET": operator.metrics},
        "/openapi.json": {"GET": document},
        "/tokenize": {"POST": text.tokenize},
        "/detokenize": {"POST": text.detokenize},
        "/debug/route": {"POST": debug.route},
    }
    patterns = {_MODEL_PREFIX: ("model", operator.model), REQUESTS_PREFIX: ("request", debug.request)}
    return GatewayApp(routes, patterns, metrics, settings, work, logger)


class GatewayApp:
    """The ASGI application. Routing is a look-up, but for ids, which may contain '/' and come last.

    Args:
        routes: Path to the handlers of its methods.
        patterns: What stands before an id, to the id's name and the handler of GET.
    """

    def __init__(
        self,
        routes: Routes,
        patterns: Mapping[str, tuple[str, Handler]],
        metrics: GatewayMetrics,
        settings: Callable[[], GatewaySettings],
        work: TextWork,
        logger: logging.Logger,
    ) -> None:
        """Join what `make_app` made."""
        self._routes = routes
        self._patterns = patterns
        self._metrics = metrics
        self._settings = settings
        self._work = work
        self._logger = logger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the server's lifespan."""
        if scope["type"] == "http":
            await self._answer(Exchange(scope, receive, send))
        elif scope["type"] == "lifespan":
            await self._live(receive, send)
        else:  # websocket: closed before it is accepted, which a client sees as 403
            await send({"type": "websocket.close", "code": 1000})

    async def _live(self, receive: Receive, send: Send) -> None:
        while (kind := (await receive())["type"]) != "lifespan.shutdown":
            await send({"type": f"{kind}.complete"})
        self._work.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(self, exchange: Exchange) -> None:
        self._metrics.requests_in_flight += 1
        status = CLIENT_CLOSED_REQUEST  # unless it stays until the end
        try:
            await self._handler(exchange)(exchange)
            status = exchange.status
        except ClientGone:
            self._logger.info("request %s: the client went away", exchange.request_id)
        except Exception as exc:
            status = await self._fail(exchange, exc)
        finally:
            self._metrics.requests_in_flight -= 1
            self._metrics.count_request(exchange.model, exchange.endpoint, status)

    def _handler(self, exchange: Exchange) -> Handler:
        path = exchange.path
        methods = self._routes.get(path)
        exchange.endpoint = path
        if methods is None:
            prefix = next((prefix for prefix in self._patterns if path.startswith(prefix) and path != prefix), None)
            if prefix is None:
                exchange.endpoint = ""  # any text could be a path, and a metric has a bounded number of labels
                raise ApiError(
                    404, f"There is no {printable(path)}. GET /openapi.json lists what there is.", code="not_found"
                )
            name, show = self._patterns[prefix]
            methods, exchange.endpoint = {"GET": show}, f"{prefix}{{{name}}}"
        handler = methods.get("GET" if exchange.method == "HEAD" else exchange.method)
        if handler is None:
            allowed = ", ".join(methods)
            raise ApiError(
                405,
                f"{exchange.endpoint} takes {allowed} only.",
                code="method_not_allowed",
                headers=((b"allow", allowed.encode()),),
            )
        return handler

    async def _fail(self, exchange: Exchange, exc: Exception) -> int:
        """Tell the client and the log; return the status for the metrics."""
        known = from_exception(exc, self._settings().retry_after_s)
        error = known or internal_error(exchange.request_id)
        self._logger.log(
            logging.ERROR if error.status >= 500 else logging.WARNING,
            "request %s: %s %s model=%s status=%d code=%s after %.1f ms: %s",
            exchange.request_id,
            exchange.method,
            printable(exchange.path),
            exchange.model or "-",
            error.status,
            error.code or "-",
            (time.monotonic() - exchange.started_s) * 1000,
            printable(str(exc), 300),
            exc_info=exc if known is None else None,
        )
        try:
            await exchange.send_error(error)
        except ClientGone:
            return CLIENT_CLOSED_REQUEST
        return error.status
