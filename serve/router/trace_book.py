"""TraceBook: the latest sequences of one gateway, for whoever asks how they were routed."""

from collections import deque
from collections.abc import Sequence

from serve.router.trace import RouteTrace


class TraceBook:
    """Sequences in flight, and the last that ended."""

    def __init__(self) -> None:
        self._by_sequence: dict[str, RouteTrace] = {}
        self._by_request: dict[str, list[RouteTrace]] = {}
        self._ended: deque[str] = deque()  # sequence ids, in the order of their end

    def __len__(self) -> int:
        return len(self._by_sequence)

    def add(self, trace: RouteTrace) -> None:
        """Remember a sequence that begins."""
        self._by_sequence[trace.sequence_id] = trace
        self._by_request.setdefault(trace.hints.request_id, []).append(trace)

    def ended(self, trace: RouteTrace, kept: int) -> None:
        """A sequence has ended; forget the oldest of those that have, but `kept`."""
        self._ended.append(trace.sequence_id)
        while len(self._ended) > kept:
            self._forget(self._by_sequence.pop(self._ended.popleft()))

    def sequence(self, sequence_id: str) -> RouteTrace | None:
        """Return one sequence, if it is remembered."""
        return self._by_sequence.get(sequence_id)

    def request(self, request_id: str) -> Sequence[RouteTrace]:
        """Return the remembered sequences of an HTTP request; of several, if clients use an id again."""
        return self._by_request.get(request_id, ())

    def _forget(self, trace: RouteTrace) -> None:
        request_id = trace.hints.request_id
        rest = [other for other in self._by_request[request_id] if other is not trace]
        if rest:
            self._by_request[request_id] = rest
        else:
            del self._by_request[request_id]
