"""RoutingDesk: what the gateway tells routing of its sequences, and what it can say about them afterwards."""

import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Self

from serve.core.request import FinishReason, GenerateRequest, PrefillInfo, TokenDelta
from serve.errors import RayTRTError
from serve.ingress.settings import GatewaySettings
from serve.router.board import RoutingBoard
from serve.router.fair_gate import FairGate
from serve.router.hints import RouteHints
from serve.router.logged_request import logged_request
from serve.router.records import RouteRecord, make_record
from serve.router.request_log_writer import LogTarget, RequestLogWriter
from serve.router.trace import RouteState, RouteTrace
from serve.router.trace_book import TraceBook

AskPeers = Callable[[str], Awaitable[list[RouteRecord]]]


async def no_peers(request_id: str) -> list[RouteRecord]:
    """There is one gateway."""
    return []


class RoutingDesk:
    """Routing of all models of one gateway process. One event loop uses it.

    Args:
        boards: Model id to its board; without those that Ray Serve's own router places.
        settings: Returns the settings in force.
        gateway_id: Unique among the gateways; names its request log.
        ask_peers: Asks the other gateways for the records of a request; may fail with any exception.

    Attributes:
        boards: The same.
        gates: Model id to where its sequences wait while no replica has room; without those that do not wait here.
    """

    def __init__(
        self,
        boards: Mapping[str, RoutingBoard],
        settings: Callable[[], GatewaySettings] = GatewaySettings,
        gateway_id: str = "gateway",
        ask_peers: AskPeers = no_peers,
    ) -> None:
        self.boards = boards
        self.gates = {
            model: FairGate(board, board.fairness) for model, board in boards.items() if board.fairness.enabled
        }
        self._settings = settings
        self._gateway_id = gateway_id
        self._ask_peers = ask_peers
        self._book = TraceBook()
        self._log = RequestLogWriter()
        self._log_settings: GatewaySettings | None = None

    # Sequences

    def following(self, request: GenerateRequest, hints: RouteHints) -> "Following":
        """Return a context around the life of a sequence; enter it before the sequence is sent to a replica."""
        return Following(self, request, hints)

    def begin(self, request: GenerateRequest, hints: RouteHints) -> RouteTrace:
        """A sequence is about to be sent to a replica; `end` has to follow."""
        trace = RouteTrace(request, hints, time.monotonic())
        self._book.add(trace)
        board = self.boards.get(request.model)
        if board is not None:
            board.open(trace)
            self._follow_settings()
            if self._log.is_open:
                trace.output = []
        return trace

    async def admit(self, trace: RouteTrace, request: GenerateRequest) -> None:
        """Return when a sequence that has begun may be sent to a replica.

        Raises:
            Overloaded: There is no room for it, and too many wait, or it has waited too long.
        """
        gate = self.gates.get(trace.model)
        if gate is not None:
            await gate.enter(trace, request)

    def note(self, trace: RouteTrace, delta: TokenDelta, replica_id: str) -> None:
        """A delta of a sequence has come from a replica."""
        trace.output_tokens += len(delta.token_ids)
        if trace.output is not None:
            trace.output.extend(delta.token_ids)
        if not trace.first_s:
            self._note_first(trace, delta, replica_id)

    def _note_first(self, trace: RouteTrace, delta: TokenDelta, replica_id: str) -> None:
        prefill = delta.prefill
        if prefill is not None:  # without what is large
            trace.prefill = PrefillInfo(prefill.cached_tokens, prefill.queue_s, prefill.prefill_s)
        if not delta.token_ids and delta.finish_reason is None:
            return
        if not trace.replica_id:  # Ray Serve's own router does not say it, and ours may be slower than the token
            trace.replica_id = replica_id
        trace.first_s, trace.state = time.monotonic(), RouteState.STREAMING
        board = self.boards.get(trace.model)
        if board is not None:
            board.began(trace)

    def end(
        self, trace: RouteTrace, request: GenerateRequest, reason: FinishReason | None, *, failed: bool = False
    ) -> None:
        """A sequence has ended; without a reason, its client or an error ended it."""
        now_s = time.monotonic()
        trace.ended_s = now_s
        if trace.first_s:
            trace.last_s = now_s
        if reason is not None:
            trace.finish_reason, trace.state = str(reason), RouteState.FINISHED
        else:
            trace.state = RouteState.FAILED if failed else RouteState.CANCELLED
        board = self.boards.get(trace.model)
        if board is not None:
            router = board.roster.router
            if trace.output is not None and router is not None:
                self._log.write(logged_request(trace, request, time.time(), router.tokens_per_block))
            board.close(trace)
        gate = self.gates.get(trace.model)
        if gate is not None:
            gate.leave(trace)
        trace.output = None
        self._book.ended(trace, self._settings().routing_records)

    # Questions

    @property
    def log_dropped(self) -> int:
        """Lines that are missing in the request log."""
        return self._log.dropped

    def record(self, sequence_id: str) -> RouteRecord | None:
        """Return what is known of a sequence of this gateway."""
        trace = self._book.sequence(sequence_id)
        return None if trace is None else make_record(trace)

    def local_records(self, request_id: str) -> list[RouteRecord]:
        """Return what this gateway knows of the sequences of an HTTP request."""
        return [make_record(trace) for trace in self._book.request(request_id)]

    async def records(self, request_id: str) -> list[RouteRecord]:
        """The same, of all gateways, if this one knows nothing; empty if none does."""
        return self.local_records(request_id) or await self._ask_peers(request_id)

    def preview(self, request: GenerateRequest, hints: RouteHints) -> RouteRecord | None:
        """Return where a sequence would go now; None if that is not decided here."""
        board = self.boards.get(request.model)
        if board is None:
            return None
        trace = RouteTrace(request, hints, time.monotonic())
        board.preview(request, trace)
        return make_record(trace)

    async def close(self) -> None:
        """Write what is left of the request log."""
        await self._log.close()

    def _follow_settings(self) -> None:
        settings = self._settings()
        if settings is self._log_settings:
            return
        self._log_settings = settings
        target = None
        if settings.request_log is not None:
            path = Path(settings.request_log)
            path = path.with_name(f"{path.stem}.{self._gateway_id}{path.suffix}")
            target = LogTarget(path, settings.request_log_max_bytes, settings.request_log_max_files)
        self._log.set_target(target)


class Following:
    """The life of one sequence, told to the desk. However the context is left, the sequence has ended."""

    __slots__ = ("_desk", "_ended", "_hints", "_request", "_trace")

    def __init__(self, desk: RoutingDesk, request: GenerateRequest, hints: RouteHints) -> None:
        self._desk = desk
        self._request = request
        self._hints = hints
        self._ended = False

    def __enter__(self) -> Self:
        self._trace = self._desk.begin(self._request, self._hints)
        return self

    async def admitted(self) -> None:
        """Return when the sequence may be sent to a replica; see `RoutingDesk.admit`."""
        await self._desk.admit(self._trace, self._request)

    def note(self, delta: TokenDelta, replica_id: str) -> None:
        """A delta has come from a replica; with a finish reason, it is the end."""
        self._desk.note(self._trace, delta, replica_id)
        if delta.finish_reason is not None:
            self._ended = True
            self._desk.end(self._trace, self._request, delta.finish_reason)

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: object) -> None:
        if not self._ended:
            self._desk.end(self._trace, self._request, None, failed=isinstance(exc, RayTRTError))
