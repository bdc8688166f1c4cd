"""FairQueue: who is served next when there is not room for all.

Start-time fair queueing (Goyal, Vin, Cheng, IEEE/ACM ToN 5, 1997) over tenants, in the tokens that an engine has to
compute for them: prompt tokens that no replica holds, and output. A tenant has one account, whatever the priorities of
its requests. Its start tag is what it has been served so far, divided by its weight, and never behind the virtual time,
which is the start tag of whoever was served last: so nobody saves up by being idle, and nobody pays for having had
an idle fleet to himself. The tenant with the lowest start tag is next.

While two tenants both wait, in one class, what they are served, divided by their weights, differs by at most the
largest cost of one request of each, divided by its weight (theorem 1 there), whatever others do.

Priorities are classes: a lower number is served first, as vLLM has it. A request moves up a class each `aging_s`, so
that it waits for higher classes a bounded time. Within a class tenants share as above; what a tenant was served in a
high class is on its account in the low ones.

A full queue drops the newest request of the least urgent class of the tenant that waits for most in proportion to its
weight, as a flood must not keep others out (McKenney, "Stochastic fairness queueing", 1990).

Pure: no clock, no waiting. Every operation takes O(log n) amortised, and O(classes log n) where a tag changes.
"""

import heapq
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

OTHERS = "(others)"  # the account of those who came when all accounts were taken
_RATE_HALF_LIFE_S = 10.0
_MIN_RETRY_S, _MAX_RETRY_S = 1.0, 60.0


class Waiting(NamedTuple):
    """A request that waits for room.

    Attributes:
        number: Names it; never used twice.
        tenant: Who is accountable.
        cost: > 0; tokens to compute, see `request_cost`.
        priority: Its class at first; lower is served first.
        deadline_s: It is worthless from then on.
    """

    number: int
    tenant: str
    cost: float
    priority: int = 0
    deadline_s: float = math.inf


@dataclass(frozen=True)
class FairLimits:
    """Settings of a queue.

    Attributes:
        weights: Shares of tenants, relative to each other; > 0.
        default_weight: Share of every other tenant.
        max_queued: Requests that wait at most.
        aging_s: Time after which a request moves up one class.
        highest_class: Class from which none moves up; lower numbers count as it.
        lowest_class: Higher numbers count as this one.
        max_tenants: Accounts at most; further tenants share one.
    """

    weights: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    default_weight: float = 1.0
    max_queued: int = 1024
    aging_s: float = 5.0
    highest_class: int = -3
    lowest_class: int = 3
    max_tenants: int = 1024


class Offer(NamedTuple):
    """What became of a request that wanted to wait.

    Attributes:
        refused: Who has to go: the request itself, or another one that waited; None: there was room.
        retry_after_s: When trying again is worthwhile for the refused one.
    """

    refused: Waiting | None = None
    retry_after_s: float = 0.0


@dataclass(eq=False)
class _Account:
    """A tenant, or those who share an account.

    Attributes:
        start: Its start tag; while nothing waits, the end of what it was served.
        classes: What waits, in the order of arrival, by class; no empty ones.
        known_length: The highest entry for it in the heap of lengths.
    """

    name: str
    weight: float
    start: float
    classes: dict[int, OrderedDict[int, Waiting]] = field(default_factory=dict)
    count: int = 0
    cost: float = 0.0
    known_length: float = 0.0

    @property
    def length(self) -> float:
        return self.count / self.weight


class FairQueue:
    """Requests that wait for room in the fleet of one model.

    Args:
        limits: Its settings.
    """

    def __init__(self, limits: FairLimits) -> None:
        self._limits = limits
        self._accounts: dict[str, _Account] = {}
        self._waiting: dict[int, tuple[Waiting, _Account, int]] = {}
        self._tags: dict[int, list[tuple[float, int, str]]] = {}  # by class: heap of (start, number, account)
        self._lengths: list[tuple[float, str]] = []  # heap of (-length, account); no length is above its entry
        self._aging: list[tuple[float, int]] = []  # heap of (when, number)
        self._deadlines: list[tuple[float, int]] = []
        self._inserted = 0  # since the last sweep
        self._virtual = 0.0
        self._weight = 0.0  # of the accounts that wait
        self._served = 0.0  # cost and time, both forgotten alike: their quotient is the rate
        self._served_s = 0.0
        self._rated_s = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, number: int) -> bool:
        return number in self._waiting

    def queued(self) -> dict[str, int]:
        """Return how many requests wait, by account; none with 0."""
        return {name: account.count for name, account in self._accounts.items() if account.count}

    # In

    def offer(self, request: Waiting, now_s: float) -> Offer:
        """Let a request wait; or another one go that has less of a claim to the place, or the request itself."""
        self._pass(now_s)
        account = self._account(request.tenant)
        level = min(max(request.priority, self._limits.highest_class), self._limits.lowest_class)
        refused = self._victim(account, level, request) if len(self) >= self._limits.max_queued else None
        retry_after_s = 0.0
        if refused is not None:
            holder = self._waiting[refused.number][1] if refused is not request else account
            retry_after_s = self._retry_after_s(holder, refused)
        if refused is request:
            if not account.count and account.start <= self._virtual:
                del self._accounts[account.name]
            return Offer(refused, retry_after_s)
        self._insert(request, account, level, now_s)
        if refused is not None:
            self._remove(refused.number)
        self._sweep_sometimes()
        return Offer(refused, retry_after_s)

    # Out

    def take(self, now_s: float) -> Waiting | None:
        """Return the one that is served next, which waits no longer; None if nobody waits. Call `expire` before."""
        self._pass(now_s)
        for level in sorted(self._tags):
            heap = self._tags[level]
            while heap:
                start, _, name = heap[0]
                account = self._accounts.get(name)
                if account is not None and level in account.classes and account.start == start:
                    return self._serve(account, level)
                heapq.heappop(heap)  # said before the account was served elsewhere, or emptied
            del self._tags[level]
        return None

    def cancel(self, number: int) -> bool:
        """Forget a request; whether it waited."""
        found = number in self._waiting
        if found:
            self._remove(number)
        return found

    def expire(self, now_s: float) -> list[Waiting]:
        """Forget the requests whose deadline has come; return them, the earliest first."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= now_s:
            number = heapq.heappop(self._deadlines)[1]
            if number in self._waiting:
                late.append(self._waiting[number][0])
                self._remove(number)
        return late

    def next_deadline_s(self) -> float:
        """Return when `expire` has something to do again; infinity: never."""
        while self._deadlines and self._deadlines[0][1] not in self._waiting:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else math.inf

    def correct(self, tenant: str, cost: float) -> None:
        """Charge a tenant for more than was expected when its request was taken, or less if negative."""
        account = self._accounts.get(tenant)
        if account is not None:
            account.start += cost / account.weight
            self._push_tags(account)

    def retry_after_s(self, tenant: str) -> float:
        """Return when a request of a tenant, sent now, would be served, by the rate of late."""
        account = self._accounts.get(tenant)
        return self._retry_after_s(account, None) if account is not None else _MIN_RETRY_S

    # Accounts

    def _account(self, tenant: str) -> _Account:
        account = self._accounts.get(tenant)
        if account is None:
            if len(self._accounts) >= self._limits.max_tenants:
                self._purge()
            name = tenant if len(self._accounts) < self._limits.max_tenants else OTHERS
            account = self._accounts.get(name)
            if account is None:
                weight = self._limits.weights.get(name, self._limits.default_weight)
                account = self._accounts[name] = _Account(name, weight, self._virtual)
        return account

    def _purge(self) -> None:
        """Close accounts that would be opened again as they are."""
        for name in [name for name, a in self._accounts.items() if not a.count and a.start <= self._virtual]:
            del self._accounts[name]

    def _insert(self, request: Waiting, account: _Account, level: int, now_s: float) -> None:
        if not account.count:
            account.start = max(account.start, self._virtual)
            self._weight += account.weight
        account.count += 1
        account.cost += request.cost
        self._place(request, account, level, now_s)
        if request.deadline_s < math.inf:
            heapq.heappush(self._deadlines, (request.deadline_s, request.number))
        if account.length > account.known_length:
            account.known_length = account.length
            heapq.heappush(self._lengths, (-account.length, account.name))

    def _place(self, request: Waiting, account: _Account, level: int, now_s: float) -> None:
        self._waiting[request.number] = (request, account, level)
        queue = account.classes.get(level)
        if queue is None:
            queue = account.classes[level] = OrderedDict()
            heapq.heappush(self._tags.setdefault(level, []), (account.start, request.number, account.name))
        queue[request.number] = request
        if level > self._limits.highest_class:
            heapq.heappush(self._aging, (now_s + self._limits.aging_s, request.number))

    def _push_tags(self, account: _Account) -> None:
        for level, queue in account.classes.items():
            heapq.heappush(self._tags.setdefault(level, []), (account.start, next(iter(queue)), account.name))

    def _remove(self, number: int) -> tuple[Waiting, _Account]:
        request, account, level = self._waiting.pop(number)
        self._unplace(request, account, level)
        account.count -= 1
        account.cost -= request.cost
        if not account.count:
            account.cost = 0.0
            self._weight -= account.weight
        if not self._waiting:
            self._end_busy_period()
        return request, account

    def _unplace(self, request: Waiting, account: _Account, level: int) -> None:
        queue = account.classes[level]
        del queue[request.number]
        if not queue:
            del account.classes[level]

    def _sweep_sometimes(self) -> None:
        """Throw away what the heaps hold of requests that wait no longer, each time there are as many entries as that.

        Requests that come and are cancelled, while others wait, would otherwise leave entries for ever.
        """
        self._inserted += 1
        if self._inserted <= max(self._limits.max_queued, 64):
            return
        self._inserted = 0
        waiting = self._waiting
        self._aging = sorted({entry for entry in self._aging if entry[1] in waiting})
        self._deadlines = sorted({entry for entry in self._deadlines if entry[1] in waiting})
        self._tags.clear()
        for account in self._accounts.values():
            account.known_length = account.length
            self._push_tags(account)
        self._lengths = sorted((-account.length, name) for name, account in self._accounts.items() if account.count)

    def _end_busy_period(self) -> None:
        """Nobody waits: whoever comes next finds everybody even."""
        self._accounts.clear()
        for heap in (self._lengths, self._aging, self._deadlines):
            heap.clear()
        self._tags.clear()
        self._virtual = self._weight = 0.0

    # Decisions

    def _serve(self, account: _Account, level: int) -> Waiting:
        request = next(iter(account.classes[level].values()))
        self._virtual = max(self._virtual, account.start)
        account.start += request.cost / account.weight
        self._served += request.cost
        self._remove(request.number)
        self._push_tags(account)
        return request

    def _pass(self, now_s: float) -> None:
        """Note that it is `now_s`: requests move up, and what was served long ago counts less for the rate."""
        while self._aging and self._aging[0][0] <= now_s:
            when_s, number = heapq.heappop(self._aging)
            if number in self._waiting:
                request, account, level = self._waiting[number]
                self._unplace(request, account, level)
                self._place(request, account, level - 1, when_s)
        elapsed_s = now_s - self._rated_s
        if elapsed_s > 0.0:
            keep = 0.5 ** (elapsed_s / _RATE_HALF_LIFE_S)
            self._served *= keep
            self._served_s = self._served_s * keep + (elapsed_s if self._waiting else 0.0)
            self._rated_s = now_s

    def _victim(self, account: _Account, level: int, request: Waiting) -> Waiting:
        longest = self._longest()
        least_urgent = max(longest.classes)
        if longest is account and least_urgent <= level:
            return request
        if longest is not account and longest.length <= (account.count + 1) / account.weight:
            return request
        return next(reversed(longest.classes[least_urgent].values()))

    def _longest(self) -> _Account:
        """Return the account that most waits in, for its weight; somebody waits."""
        while True:
            length, name = self._lengths[0]
            account = self._accounts.get(name)
            if account is not None and account.count and -length == account.length:
                return account
            heapq.heappop(self._lengths)
            if account is not None and -length == account.known_length:
                account.known_length = account.length
                if account.count:
                    heapq.heappush(self._lengths, (-account.length, name))

    def _retry_after_s(self, account: _Account, refused: Waiting | None) -> float:
        if self._served <= 0.0 or self._served_s <= 0.0:
            return _MIN_RETRY_S
        ahead = account.cost + (refused.cost if refused is not None else 0.0)
        weight = self._weight if account.count else self._weight + account.weight
        rate = self._served / self._served_s * account.weight / weight
        return min(max(ahead / rate, _MIN_RETRY_S), _MAX_RETRY_S)


def request_cost(prompt_tokens: int, held_tokens: int, output_tokens: int, output_weight: float = 1.0) -> float:
    """Return what a request costs: the tokens that an engine computes for it.

    Args:
        prompt_tokens: > 0.
        held_tokens: Prompt tokens that the replica with the longest match holds.
        output_tokens: Expected output.
        output_weight: What an output token is worth, in prompt tokens.

    Source: Sheng et al., "Fairness in serving large language models", OSDI 2024, counts prompt and output tokens with
    weights 1 and 2; here tokens that are held already cost nothing, as they take no computation.
    """
    return max(1, prompt_tokens - held_tokens) + output_weight * output_tokens
