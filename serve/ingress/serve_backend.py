"""ServeBackend: reaches the models through Serve's handles; their tokens come back through a DeltaListener.

A sequence is one unary handle call that lasts as long as the sequence, so that Serve's routing, slots, limits,
cancellation, autoscaling signals and drains all see it, while the tokens of all sequences of a replica travel together,
one message for each engine step: a Serve stream costs ~200 us of CPU for each message of each sequence.
"""

import asyncio
import contextvars
import logging
import time
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import replace

import msgspec
from ray import serve as ray_serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentStatusOverview

from serve.cluster_kv import ClusterKeyValues
from serve.core.request import GenerateRequest, TokenDelta
from serve.datapath.listener import DeltaListener, DeltaStream
from serve.errors import EngineDead, Overloaded, RayTRTError
from serve.ingress.backend import FAILED, ModelReadiness
from serve.ingress.fallback_watch import FallbackWatch
from serve.ingress.routing_desk import RoutingDesk
from serve.router.hints import NO_HINTS, RouteHints
from serve.start_notes import starts_of

logger = logging.getLogger(__name__)

# A call that has returned has sent its last delta; if that has not come after this time, the connection is broken.
LAST_DELTA_TIMEOUT_S = 10.0
STATUS_MAX_AGE_S = 1.0


class ServeBackend:
    """Backend port over Serve deployments.

    Args:
        handles: Model id to the handle of its EngineReplica deployment.
        deployments: Model id to that deployment's name.
        app_name: The Serve application that they belong to.
        listener: Started; receives the deltas.
        desk: Hears of every sequence. Its boards are registered already.
        with_stand_in: Models that may be served by something else than what was configured.
    """

    def __init__(
        self,
        handles: Mapping[str, DeploymentHandle],
        deployments: Mapping[str, str],
        app_name: str,
        listener: DeltaListener,
        desk: RoutingDesk,
        with_stand_in: Collection[str] = (),
    ) -> None:
        for handle in handles.values():
            # The router on this loop, also where the process-wide switch is not set: boards belong to one loop. Serve
            # has no public way to say so for a single handle.
            handle._init(_run_router_in_separate_loop=False)
        # gRPC instead of the object store also where the process-wide switch is not set; pickle, because a request
        # knows how to pickle itself.
        self._methods = {
            model: handle.options(method_name="generate", _by_reference=False, request_serialization="pickle")
            for model, handle in handles.items()
        }
        self._deployments = dict(deployments)
        self._app_name = app_name
        self._listener = listener
        self._desk = desk
        self._fallbacks = FallbackWatch({model: handles[model] for model in with_stand_in})
        self._fallbacks.start()
        self._calls: set[asyncio.Task[None]] = set()
        self._readiness: list[ModelReadiness] = []
        self._readiness_at_s = float("-inf")
        self._refresh: asyncio.Task[list[ModelReadiness]] | None = None

    @property
    def desk(self) -> RoutingDesk:
        """See `Backend.desk`."""
        return self._desk

    async def generate(
        self, request: GenerateRequest, hints: RouteHints = NO_HINTS
    ) -> AsyncGenerator[TokenDelta, None]:
        """Stream a sequence; see `Backend.generate`."""
        address, stream = self._listener.open()
        request = msgspec.structs.replace(request, reply_to=address.to_text())
        finished = False
        # Before the call is made: on its way Serve's router asks what is known of the sequence.
        with self._desk.following(request, hints) as following:
            call = None
            try:
                await following.admitted()
                call = self._start_call(request, stream)
                while not finished:
                    delta = await stream.next()
                    finished = delta.finish_reason is not None
                    following.note(delta, stream.replica_id)
                    yield delta
            finally:
                self._listener.close_stream(address)
                stream.closed = True
                if call is not None and not finished:
                    call.cancel()

    def _start_call(self, request: GenerateRequest, stream: DeltaStream) -> asyncio.Task[None]:
        # An empty context of its own: Serve's router indexes waiting calls by the HTTP request that they belong to, and
        # loses all but one of those that share it (n > 1, batches). Cancelling is done by hand, not by inheritance.
        call = asyncio.get_running_loop().create_task(
            self._call(self._methods[request.model], request, stream), context=contextvars.Context()
        )
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return call

    async def _call(self, generate: DeploymentHandle, request: GenerateRequest, stream: DeltaStream) -> None:
        try:
            await generate.remote(request)
        except BackPressureError as exc:
            stream.fail(Overloaded(f"every replica of {request.model} is full: {exc.message}"))
        except DeploymentUnavailableError:
            stream.fail(Overloaded(f"{request.model} has no replica that could be started; see /ready", 10.0))
        except RayTaskError as exc:
            # The replica lives, and told why: its gateway cannot be reached, or it speaks another wire version.
            cause = exc.cause
            logger.error("Sequence %s failed at its replica: %s", request.request_id, cause)
            stream.fail(cause if isinstance(cause, RayTRTError) else EngineDead(f"the replica refused: {cause}"))
        except (RayError, RayServeException) as exc:
            logger.warning("Sequence %s lost its replica: %s", request.request_id, _first_line(exc))
            stream.fail(EngineDead(f"the replica of {request.model} that served this request is gone"))
        except Exception as exc:
            logger.exception("Sequence %s could not be sent to a replica.", request.request_id)
            stream.fail(EngineDead(f"the request could not be sent to a replica: {type(exc).__name__}"))
        else:
            if not stream.closed:
                await asyncio.sleep(LAST_DELTA_TIMEOUT_S)
                stream.fail(EngineDead(f"the last tokens of a replica of {request.model} were lost on the way"))

    def fallbacks(self) -> Mapping[str, str]:
        """Return the models that are not served as configured; see `Backend.fallbacks`."""
        return self._fallbacks.heard

    def close(self) -> None:
        """Stop asking replicas."""
        self._fallbacks.stop()

    async def readiness(self) -> list[ModelReadiness]:
        """Return the state of every model, not older than `STATUS_MAX_AGE_S` and one answer of Serve's controller."""
        if time.monotonic() - self._readiness_at_s > STATUS_MAX_AGE_S:
            if self._refresh is None or self._refresh.done():
                self._refresh = asyncio.create_task(asyncio.to_thread(self._ask_controller))
            try:
                self._readiness = await asyncio.wait_for(asyncio.shield(self._refresh), 1.0)
            except TimeoutError:
                return [ModelReadiness(model, 0, 0, "no answer from Serve's controller") for model in self._deployments]
            self._readiness_at_s = time.monotonic()
        return self._readiness

    def _ask_controller(self) -> list[ModelReadiness]:
        try:
            application = ray_serve.status().applications.get(self._app_name)
        except Exception as exc:  # whatever it is, /ready has to say so rather than fail
            logger.warning("Serve's controller gave no status: %s", _first_line(exc))
            return [ModelReadiness(model, 0, 0, "no status from Serve's controller") for model in self._deployments]
        statuses = application.deployments if application is not None else {}
        starting = any(_is_starting(statuses.get(name)) for name in self._deployments.values())
        notes = starts_of(ClusterKeyValues(), self._app_name, time.time()) if starting else {}
        deployments = self._deployments.items()
        found = [_readiness(model, statuses.get(name), notes.get(name, ())) for model, name in deployments]
        if application is not None and not statuses:
            return _as_before(self._readiness, found)
        return found


def _states(status: DeploymentStatusOverview) -> dict[str, int]:
    return {str(getattr(state, "value", state)): count for state, count in status.replica_states.items()}


def _is_starting(status: DeploymentStatusOverview | None) -> bool:
    return status is not None and "STARTING" in _states(status)


def _as_before(before: Sequence[ModelReadiness], found: Sequence[ModelReadiness]) -> list[ModelReadiness]:
    """Return what was known: while Serve builds an application anew, it tells of no replica, and all of them serve."""
    known = {state.model: replace(state, message="a new configuration is being built") for state in before}
    return [known.get(state.model, state) for state in found]


def _readiness(model: str, status: DeploymentStatusOverview | None, notes: Sequence[str]) -> ModelReadiness:
    if status is None:
        return ModelReadiness(model, 0, 0, "not deployed")
    states = _states(status)
    others = [f"{count} {state.lower()}" for state, count in states.items() if state != "RUNNING"]
    asleep = not states and status.status == "HEALTHY"
    # Serve's own message may be a traceback of the engine, with paths: that is for the log, which has it.
    trouble = {"DEPLOY_FAILED": FAILED, "UNHEALTHY": "unhealthy; see the log"}
    doing = list(dict.fromkeys(notes)) if _is_starting(status) else []  # replicas of one node download together
    parts = [*others, *doing, *(["asleep"] if asleep else []), *filter(None, [trouble.get(str(status.status.value))])]
    return ModelReadiness(model, states.get("RUNNING", 0), sum(states.values()), ", ".join(parts), asleep)


def _first_line(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {str(exc).strip().splitlines()[0] if str(exc).strip() else ''}"
