"""Fleet: what a gateway knows of the replicas of one model, and of the requests that it has on the way to them.

Reports say what a replica had some milliseconds ago. Requests that were routed since are reservations: they count at
once, until a report of the replica says that it has them, so that a burst does not run after stale numbers.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from serve.core.routing.balance import Balance
from serve.core.routing.decision import Column, FleetView, Rows
from serve.core.routing.load import LoadReport
from serve.core.routing.rates import FleetRates, LearnedRates, Rates

RESERVATION_TIMEOUT_S = 5.0  # a replica that has not said a word of a request for so long does not have it

# Rows of the table; one column of it a replica. FleetView begins with those before `last_routed`, in this order.
_FIELDS = (
    "running",
    "waiting",
    "queued_prefill_tokens",
    "active_blocks",
    "total_blocks",
    "committed_blocks",
    "context_tokens",
    "prefill_token_s",
    "prefill_pair_s",
    "decode_step_s",
    "queued_token_s",
    "last_routed",
    "heard_s",
)
_NUMBER = {name: number for number, name in enumerate(_FIELDS)}
_WAITING, _QUEUED, _ACTIVE = _NUMBER["waiting"], _NUMBER["queued_prefill_tokens"], _NUMBER["active_blocks"]
_COMMITTED = _NUMBER["committed_blocks"]
_REPORTED_ROWS = slice(0, _NUMBER["context_tokens"] + 1)


class Reservation(NamedTuple):
    """A request on its way to a replica.

    Attributes:
        row: The replica's.
        made_s: When it was routed.
        prefill_tokens: Prompt tokens that it will compute there.
        new_blocks: KV blocks that its prompt takes there and that are not there yet.
        committed_blocks: KV blocks at its end.
        work_s: Engine time that it was counted with, for the balance.
    """

    row: int
    made_s: float
    prefill_tokens: int
    new_blocks: int
    committed_blocks: int
    work_s: float = 0.0


class _Replica:
    """One replica's past."""

    __slots__ = ("last", "learned", "pairs_per_token", "reserved", "row")

    def __init__(self, row: int, fleet: FleetRates) -> None:
        self.row = row
        self.last: LoadReport | None = None
        self.learned = LearnedRates(fleet)
        self.pairs_per_token = 0.0
        self.reserved: dict[int, Reservation] = {}


class Fleet:
    """Replicas of one model, as one gateway sees them. Rows are the prefix index's.

    Args:
        tokens_per_block: Of their KV caches.
    """

    def __init__(self, tokens_per_block: int) -> None:
        self.tokens_per_block = tokens_per_block
        self.decisions = 0
        self._replicas: dict[str, _Replica] = {}
        self._table = np.zeros((len(_FIELDS), 8))
        self._reserved_at: OrderedDict[int, _Replica] = OrderedDict()  # by route_id, the oldest first
        self._balance = Balance()
        self._pairs_per_token = 0.0  # of all replicas' prompts
        self._rates = FleetRates()
        self._strangers: set[int] = set()  # rows of replicas whose own speed is unknown
        self._due_of_rows: Column | None = None
        self._all: tuple[tuple[str, ...], Rows] | None = None

    @property
    def replica_ids(self) -> tuple[str, ...]:
        """Everyone."""
        return self._everyone()[0]

    def __contains__(self, replica_id: str) -> bool:
        return replica_id in self._replicas

    # Membership

    def add(self, replica_id: str, row: int, now_s: float) -> None:
        """Make a replica known; idle until it reports."""
        if row >= self._table.shape[1]:
            room = np.zeros((len(_FIELDS), max(row + 1, 2 * self._table.shape[1])))
            room[:, : self._table.shape[1]] = self._table
            self._table = room
        self._replicas[replica_id] = replica = _Replica(row, self._rates)
        column = self._table[:, row]
        column[:] = 0.0
        column[_NUMBER["total_blocks"]] = 1.0
        column[_NUMBER["last_routed"]] = self.decisions - 1.0  # it has been passed over since now, not for ever
        column[_NUMBER["heard_s"]] = now_s
        self._set_rates(replica, self._rates.rates, 0.0, 0.0)
        self._strangers.add(row)
        self._balance.add(row, [other.row for other in self._replicas.values() if other.row != row])
        self._all = self._due_of_rows = None

    def remove(self, replica_id: str) -> None:
        """Forget a replica, and what was on the way to it."""
        replica = self._replicas.pop(replica_id)
        for route_id in replica.reserved:
            del self._reserved_at[route_id]
        self._balance.remove(replica.row)
        self._strangers.discard(replica.row)
        self._all = self._due_of_rows = None

    # News

    def report(
        self, replica_id: str, report: LoadReport, now_s: float, *, new_epoch: bool = False, heard: bool = True
    ) -> None:
        """Take in a replica's report; `heard`: from itself, and not what this gateway knows of it anyway."""
        replica = self._replicas[replica_id]
        before, replica.last = replica.last, report
        row, table = replica.row, self._table
        for route_id in report.accepted:
            self.release(route_id)
        if new_epoch:
            replica.learned = LearnedRates(self._rates)
            self._strangers.add(row)
            self._due_of_rows = None
        elif before is not None:
            if replica.learned.learn(before, report):
                self._due_of_rows = None
                self._strangers.discard(row)
                self._set_rates_of_strangers()
            self._learn_pairs(replica, before, report)
        table[_REPORTED_ROWS, row] = (
            report.running,
            report.waiting,
            report.queued_prefill_tokens,
            report.used_blocks,
            max(1, report.total_blocks),
            report.committed_blocks,
            report.context_tokens,
        )
        for reservation in replica.reserved.values():
            self._count(reservation, 1)
        rates = replica.learned.rates if replica.learned.known else self._rates.rates
        self._set_rates(replica, rates, report.running, report.context_tokens)
        if heard:
            table[_NUMBER["heard_s"], row] = now_s

    def all_alive(self, now_s: float) -> None:
        """Every replica was heard of, and none has anything new: what heartbeats say, where nobody sends them."""
        self._table[_NUMBER["heard_s"]] = now_s

    def reserve(self, route_id: int, replica_id: str, reservation: Reservation, work_s: float) -> None:
        """Count a request as on its way. `work_s`: engine time that it will take, for the balance."""
        self.release(route_id)
        replica = self._replicas[replica_id]
        replica.reserved[route_id] = reservation._replace(work_s=work_s)
        self._reserved_at[route_id] = replica
        self._count(reservation, 1)
        self._balance.count(reservation.row, work_s)
        self._table[_NUMBER["last_routed"], reservation.row] = self.decisions
        self.decisions += 1
        while True:
            oldest, holder = next(iter(self._reserved_at.items()))
            if reservation.made_s - holder.reserved[oldest].made_s < RESERVATION_TIMEOUT_S:
                break
            self.release(oldest)

    def release(self, route_id: int) -> None:
        """A request is known to its replica, or will never be."""
        replica = self._reserved_at.pop(route_id, None)
        if replica is not None:
            self._count(replica.reserved.pop(route_id), -1)

    def recall(self, route_id: int) -> None:
        """A request that is on its way comes back to be routed again: its work counts nowhere."""
        replica = self._reserved_at.get(route_id)
        if replica is not None:
            self._balance.take_back(replica.row, replica.reserved[route_id].work_s)
            self.release(route_id)

    # The view

    def view(self, now_s: float, candidates: Sequence[str] | None = None) -> FleetView:
        """Return the columns of the candidates; None: of all replicas. Unknown ones are left out."""
        if candidates is None:
            replica_ids, rows = self._everyone()
        else:
            replica_ids = tuple(name for name in candidates if name in self._replicas)
            found = (self._replicas[name].row for name in replica_ids)
            rows = np.fromiter(found, dtype=np.intp, count=len(replica_ids))
        table = self._table[:, rows]
        shares = self._balance.shares(rows, self._due()[rows])
        last_routed, age_s = table[_NUMBER["last_routed"]], now_s - table[_NUMBER["heard_s"]]
        columns = [*table[: _NUMBER["last_routed"]], *shares, last_routed, age_s]
        fields: list[Any] = [replica_ids, rows, *columns, self.tokens_per_block, now_s, self.decisions]
        return FleetView(*fields)

    def _due(self) -> Column:
        """Return how many times the mean's requests each replica may have, by its speed."""
        if self._due_of_rows is None:
            rows = self._everyone()[1]
            each_s = (
                self._table[_NUMBER["prefill_token_s"]] + self._table[_NUMBER["prefill_pair_s"]] * self._pairs_per_token
            )
            speed = 1.0 / np.maximum(each_s, 1e-12)
            self._due_of_rows = np.maximum(1.0, speed * (len(rows) / max(1e-12, float(speed[rows].sum()))))
        return self._due_of_rows

    def _everyone(self) -> tuple[tuple[str, ...], Rows]:
        if self._all is None:
            rows = np.fromiter((replica.row for replica in self._replicas.values()), dtype=np.intp)
            self._all = tuple(self._replicas), rows
        return self._all

    def _count(self, reservation: Reservation, sign: int) -> None:
        column = self._table[:, reservation.row]
        column[_WAITING] += sign
        column[_QUEUED] += sign * reservation.prefill_tokens
        column[_ACTIVE] += sign * reservation.new_blocks
        column[_COMMITTED] += sign * reservation.committed_blocks

    def _learn_pairs(self, replica: _Replica, before: LoadReport, after: LoadReport) -> None:
        tokens = after.prefilled_tokens - before.prefilled_tokens
        if tokens > 0:
            keep = 0.5 ** (tokens / 1e5)
            pairs = (after.prefilled_pairs - before.prefilled_pairs) / tokens
            replica.pairs_per_token = keep * replica.pairs_per_token + (1.0 - keep) * pairs
            keep **= 1.0 / len(self._replicas)
            self._pairs_per_token = keep * self._pairs_per_token + (1.0 - keep) * pairs

    def _set_rates_of_strangers(self) -> None:
        """Let those whose own speed is unknown be like the fleet as it is known now, and not as it was."""
        if self._strangers:
            rates, table, rows = self._rates.rates, self._table, list(self._strangers)
            table[_NUMBER["queued_token_s"], rows] = rates.token_s + rates.pair_s * self._pairs_per_token
            table[_NUMBER["prefill_token_s"], rows] = rates.token_s
            table[_NUMBER["prefill_pair_s"], rows] = rates.pair_s
            table[_NUMBER["decode_step_s"], rows] = rates.decode_step_s(
                table[_NUMBER["running"], rows], table[_NUMBER["context_tokens"], rows]
            )

    def _set_rates(self, replica: _Replica, rates: Rates, running: float, context_tokens: float) -> None:
        column = self._table[:, replica.row]
        column[_NUMBER["queued_token_s"]] = rates.token_s + rates.pair_s * replica.pairs_per_token
        column[_NUMBER["prefill_token_s"]] = rates.token_s
        column[_NUMBER["prefill_pair_s"]] = rates.pair_s
        column[_NUMBER["decode_step_s"]] = rates.decode_step_s(running, context_tokens)
