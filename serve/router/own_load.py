"""OwnLoad: how busy replicas are that do not say it themselves, as far as this gateway keeps them busy."""

import msgspec

from serve.core.routing.load import LoadReport
from serve.router.trace import RouteTrace


class OwnLoad:
    """This gateway's sequences on replicas that are not heard: without them such a replica would always look idle."""

    def __init__(self) -> None:
        self._sequences: dict[str, set[RouteTrace]] = {}
        self._last: dict[str, LoadReport] = {}

    def add(self, replica_id: str, last: LoadReport) -> None:
        """Begin to count what a replica has. `last`: what it said last of what cannot be known from here."""
        self._sequences.setdefault(replica_id, set())
        self._last[replica_id] = last

    def remove(self, replica_id: str) -> None:
        """Forget a replica."""
        self._sequences.pop(replica_id, None)
        self._last.pop(replica_id, None)

    def has(self, trace: RouteTrace) -> LoadReport | None:
        """Note that a sequence is at its replica; return that replica's load, if it is counted here."""
        sequences = self._sequences.get(trace.replica_id)
        if sequences is None:
            return None
        sequences.add(trace)
        return self._report(trace.replica_id, (trace.route_id,))

    def ended(self, trace: RouteTrace) -> LoadReport | None:
        """The same for a sequence that has ended."""
        sequences = self._sequences.get(trace.replica_id)
        if sequences is None:
            return None
        sequences.discard(trace)
        return self._report(trace.replica_id)

    def _report(self, replica_id: str, accepted: tuple[int, ...] = ()) -> LoadReport:
        sequences = self._sequences[replica_id]
        running = [trace for trace in sequences if trace.first_s]
        return msgspec.structs.replace(
            self._last[replica_id],
            running=len(running),
            waiting=len(sequences) - len(running),
            queued_prefill_tokens=sum(trace.prompt_tokens for trace in sequences if not trace.first_s),
            context_tokens=sum(trace.prompt_tokens + trace.output_tokens for trace in running),
            accepted=accepted,
        )
