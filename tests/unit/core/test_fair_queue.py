"""FairQueue: shares, classes, aging, bounds; and its heaps against a model that searches lists."""

import math
from collections import Counter, defaultdict
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve.core.fair_queue import OTHERS, FairLimits, FairQueue, Waiting, request_cost

ONE_CLASS = {"highest_class": 0, "lowest_class": 0}


def drain(queue: FairQueue, now_s: float = 0.0) -> list[Waiting]:
    taken = []
    while (request := queue.take(now_s)) is not None:
        taken.append(request)
    return taken


def test_requests_of_one_tenant_leave_in_the_order_of_their_arrival() -> None:
    queue = FairQueue(FairLimits())
    for number in range(5):
        assert queue.offer(Waiting(number, "a", 10.0 - number), 0.0).refused is None
    assert [request.number for request in drain(queue)] == [0, 1, 2, 3, 4]
    assert queue.take(0.0) is None


def test_a_flood_does_not_delay_another_tenant() -> None:
    queue = FairQueue(FairLimits())
    for number in range(100):
        queue.offer(Waiting(number, "flood", 1000.0), 0.0)
    queue.take(0.0)
    queue.offer(Waiting(100, "small", 100.0), 0.0)
    assert queue.take(0.0) == Waiting(100, "small", 100.0)


def test_weights_are_shares_of_tokens_and_not_of_requests() -> None:
    queue = FairQueue(FairLimits(weights={"a": 3.0}, default_weight=1.0))
    numbers = count()
    for _ in range(400):
        queue.offer(Waiting(next(numbers), "a", 100.0), 0.0)
        queue.offer(Waiting(next(numbers), "b", 20.0), 0.0)
    tokens: Counter[str] = Counter()
    while sum(tokens.values()) < 10_000:
        request = queue.take(0.0)
        assert request is not None
        tokens[request.tenant] += int(request.cost)
    assert tokens["a"] / tokens["b"] == pytest.approx(3.0, rel=0.05)


def test_who_was_idle_saved_nothing_up() -> None:
    queue = FairQueue(FairLimits())
    numbers = count()
    for _ in range(50):
        queue.offer(Waiting(next(numbers), "a", 10.0), 0.0)
    for _ in range(20):
        queue.take(0.0)
    for _ in range(10):
        queue.offer(Waiting(next(numbers), "b", 10.0), 0.0)
    tenants = [request.tenant for request in (queue.take(0.0) for _ in range(10)) if request is not None]
    assert 4 <= tenants.count("b") <= 6


def test_a_lower_priority_number_is_served_first() -> None:
    queue = FairQueue(FairLimits(aging_s=1e9))
    for number, priority in enumerate((3, 0, -2, 0, 99, -99)):
        queue.offer(Waiting(number, "a", 1.0, priority), 0.0)
    assert [request.number for request in drain(queue)] == [5, 2, 1, 3, 0, 4]


def test_what_was_served_in_a_high_class_is_on_the_account_in_the_low_one() -> None:
    queue = FairQueue(FairLimits(aging_s=1e9))
    queue.offer(Waiting(0, "a", 100.0, -1), 0.0)
    queue.offer(Waiting(1, "a", 10.0), 0.0)
    for number in range(2, 6):
        queue.offer(Waiting(number, "b", 30.0), 0.0)
    assert [request.number for request in drain(queue)] == [0, 2, 3, 4, 5, 1]


def test_a_request_moves_up_a_class_each_time_it_has_aged() -> None:
    queue = FairQueue(FairLimits(aging_s=5.0, highest_class=-1, lowest_class=1))
    queue.offer(Waiting(0, "low", 1.0, 1), 0.0)
    for number in range(1, 4):
        queue.offer(Waiting(number, "high", 1.0, 0), 4.0)
    assert queue.take(4.9) == Waiting(1, "high", 1.0, 0)
    # At 5 s it is in class 0, too, where its tenant was served less.
    assert queue.take(5.0) == Waiting(0, "low", 1.0, 1)


def test_nobody_waits_for_higher_classes_longer_than_aging_takes() -> None:
    queue = FairQueue(FairLimits(aging_s=2.0, highest_class=-3, lowest_class=3, max_queued=100))
    numbers = count(1)
    queue.offer(Waiting(0, "low", 1.0, 3), 0.0)
    now_s = 0.0
    while 0 in queue:
        now_s += 0.1
        queue.offer(Waiting(next(numbers), "high", 1.0, -3), now_s)
        queue.offer(Waiting(next(numbers), "high", 1.0, -3), now_s)
        queue.take(now_s)
    assert 12.0 <= now_s <= 12.5


def test_when_it_is_full_the_newest_of_the_longest_goes() -> None:
    queue = FairQueue(FairLimits(weights={"big": 4.0}, max_queued=6))
    for number in range(5):
        queue.offer(Waiting(number, "flood", 1.0), 0.0)
    queue.offer(Waiting(5, "big", 1.0), 0.0)
    offer = queue.offer(Waiting(6, "small", 1.0), 0.0)
    assert offer.refused == Waiting(4, "flood", 1.0)
    assert offer.retry_after_s >= 1.0
    assert queue.offer(Waiting(7, "flood", 1.0), 0.0).refused == Waiting(7, "flood", 1.0)
    assert queue.offer(Waiting(8, "big", 1.0), 0.0).refused == Waiting(3, "flood", 1.0)
    assert queue.queued() == {"flood": 3, "small": 1, "big": 2}


def test_an_urgent_request_takes_the_place_of_its_tenants_least_urgent() -> None:
    queue = FairQueue(FairLimits(max_queued=2))
    queue.offer(Waiting(0, "a", 1.0, 0), 0.0)
    queue.offer(Waiting(1, "a", 1.0, 2), 0.0)
    assert queue.offer(Waiting(2, "a", 1.0, 1), 0.0).refused == Waiting(1, "a", 1.0, 2)
    assert queue.offer(Waiting(3, "a", 1.0, 1), 0.0).refused == Waiting(3, "a", 1.0, 1)


def test_a_queue_of_one_place_works() -> None:
    queue = FairQueue(FairLimits(max_queued=1))
    queue.offer(Waiting(0, "a", 1.0, 1), 0.0)
    assert queue.offer(Waiting(1, "b", 1.0), 0.0).refused == Waiting(1, "b", 1.0)
    assert queue.offer(Waiting(2, "a", 1.0, 0), 0.0).refused == Waiting(0, "a", 1.0, 1)
    assert drain(queue) == [Waiting(2, "a", 1.0, 0)]


def test_retry_after_follows_the_tenants_own_queue_and_rate() -> None:
    queue = FairQueue(FairLimits(max_queued=100))
    for number in range(100):
        queue.offer(Waiting(number, "ab"[number % 2], 100.0), 0.0)
    for second in range(1, 21):  # 200 tokens a second
        queue.take(second)
        queue.take(second)
        for tenant in "ab":
            queue.offer(Waiting(1000 + 2 * second + "ab".index(tenant), tenant, 100.0), second)
    # 50 requests of 100 tokens, at half of 200 tokens/s.
    assert queue.retry_after_s("a") == pytest.approx(50.0, rel=0.1)
    assert queue.retry_after_s("never seen") == 1.0


def test_deadlines_and_cancelling() -> None:
    queue = FairQueue(FairLimits())
    queue.offer(Waiting(0, "a", 1.0, deadline_s=5.0), 0.0)
    queue.offer(Waiting(1, "a", 1.0, deadline_s=3.0), 0.0)
    queue.offer(Waiting(2, "b", 1.0), 0.0)
    assert queue.next_deadline_s() == 3.0
    assert queue.expire(2.9) == []
    assert queue.expire(3.0) == [Waiting(1, "a", 1.0, deadline_s=3.0)]
    assert queue.cancel(0)
    assert not queue.cancel(0)
    assert queue.next_deadline_s() == math.inf
    assert drain(queue) == [Waiting(2, "b", 1.0)]


def test_a_correction_moves_a_tenant_back() -> None:
    queue = FairQueue(FairLimits())
    for number in range(8):
        queue.offer(Waiting(number, "ab"[number % 2], 10.0), 0.0)
    queue.take(0.0)
    queue.correct("a", 25.0)  # its output was longer than expected
    assert "".join(request.tenant for request in drain(queue)) == "bbbbaaa"


def test_tenants_without_number_share_an_account() -> None:
    queue = FairQueue(FairLimits(max_tenants=2, max_queued=1000))
    for number in range(100):
        queue.offer(Waiting(number, f"tenant {number}", 1.0), 0.0)
    assert set(queue.queued()) == {"tenant 0", "tenant 1", OTHERS}
    assert len(drain(queue)) == 100


def test_cancelled_requests_leave_nothing_behind() -> None:
    queue = FairQueue(FairLimits(max_queued=32))
    queue.offer(Waiting(0, "stays", 1.0), 0.0)
    for number in range(1, 20_000):
        queue.offer(Waiting(number, f"tenant {number % 7}", 1.0, number % 3, deadline_s=1e9), 0.0)
        queue.cancel(number)
    tags = sum(len(heap) for heap in queue._tags.values())
    assert len(queue._aging) + len(queue._deadlines) + len(queue._lengths) + tags < 1000


def test_cost_counts_what_is_computed() -> None:
    assert request_cost(1000, 900, 50) == 150
    assert request_cost(1000, 900, 50, output_weight=2.0) == 200
    assert request_cost(10, 10, 0) == 1


tenants = st.sampled_from(["a", "b", "c", "d"])
weights = st.fixed_dictionaries({name: st.sampled_from([0.5, 1.0, 2.0, 7.0]) for name in "abcd"})


@settings(deadline=None)
@given(weights, st.lists(st.tuples(tenants, st.integers(1, 50), st.integers(0, 2)), min_size=10, max_size=150))
def test_two_tenants_that_wait_differ_by_at_most_one_request_of_each(
    shares: dict[str, float], arrivals: list[tuple[str, int, int]]
) -> None:
    """Theorem 1 of Goyal et al., over every interval in which both wait, whatever arrives and is taken meanwhile."""
    queue = FairQueue(FairLimits(weights=shares, max_queued=10_000, **ONE_CLASS))
    numbers = count()
    for tenant in "ab":  # so that something always waits
        queue.offer(Waiting(next(numbers), tenant, 50.0), 0.0)
    served: dict[str, float] = defaultdict(float)
    history: list[tuple[float, float, bool]] = []
    for tenant, cost, takes in arrivals:
        queue.offer(Waiting(next(numbers), tenant, float(cost)), 0.0)
        for _ in range(takes):
            waiting = queue.queued()
            history.append((served["a"] / shares["a"], served["b"] / shares["b"], "a" in waiting and "b" in waiting))
            request = queue.take(0.0)
            if request is None:
                break
            served[request.tenant] += request.cost
    bound = 50.0 / shares["a"] + 50.0 / shares["b"]
    for begin in range(len(history)):
        for end in range(begin, len(history)):
            if not history[end][2]:
                break
            moved = [history[end][tenant] - history[begin][tenant] for tenant in (0, 1)]
            assert abs(moved[0] - moved[1]) <= bound + 1e-6


class QueueMachine(RuleBasedStateMachine):
    """Arbitrary operations, against lists that are searched from end to end."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = FairLimits({"a": 2.0}, 1.0, 8, 5.0, -1, 1, 3)
        self.queue = FairQueue(self.limits)
        self.now_s = 0.0
        self.numbers = count()
        self.inside: dict[int, tuple[Waiting, float]] = {}  # with the time of arrival, in the order of arrival

    def level(self, number: int) -> int:
        request, arrived_s = self.inside[number]
        level = min(max(request.priority, -1), 1)
        return max(-1, level - int((self.now_s - arrived_s) / 5.0))

    @rule(
        tenant=st.sampled_from("abcde"), cost=st.integers(1, 9), priority=st.integers(-3, 3), lasts_s=st.integers(1, 30)
    )
    def offer(self, tenant: str, cost: int, priority: int, lasts_s: int) -> None:
        request = Waiting(next(self.numbers), tenant, float(cost), priority, self.now_s + lasts_s)
        full = len(self.inside) == self.limits.max_queued
        offer = self.queue.offer(request, self.now_s)
        assert (offer.refused is not None) == full
        self.inside[request.number] = (request, self.now_s)
        if offer.refused is not None:
            assert 1.0 <= offer.retry_after_s <= 60.0
            del self.inside[offer.refused.number]

    @precondition(lambda self: self.inside)
    @rule()
    def take(self) -> None:
        before = {name: account.start for name, account in self.queue._accounts.items()}
        # Of more tenants than there may be accounts, one may have requests in the shared account and in one of its own.
        holders = {number: entry[1].name for number, entry in self.queue._waiting.items()}
        request = self.queue.take(self.now_s)
        assert request is not None  # work conservation
        levels = {number: self.level(number) for number in self.inside}
        assert levels[request.number] == min(levels.values())

        rivals = [number for number, level in levels.items() if level == min(levels.values())]
        assert before[holders[request.number]] == min(before[holders[number]] for number in rivals)
        same = [
            number
            for number in rivals
            if holders[number] == holders[request.number] and self.inside[number][0].priority == request.priority
        ]
        assert request.number == min(same)  # first in, first out
        del self.inside[request.number]

    @rule(number=st.integers(0, 60))
    def cancel(self, number: int) -> None:
        assert self.queue.cancel(number) == (self.inside.pop(number, None) is not None)

    @rule(seconds=st.sampled_from([0.5, 3.0, 12.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        late = {number for number, (request, _) in self.inside.items() if request.deadline_s <= self.now_s}
        assert {request.number for request in self.queue.expire(self.now_s)} == late
        self.inside = {number: entry for number, entry in self.inside.items() if number not in late}

    @invariant()
    def agrees(self) -> None:
        assert len(self.queue) == len(self.inside) == sum(self.queue.queued().values())
        earliest = min((request.deadline_s for request, _ in self.inside.values()), default=math.inf)
        assert self.queue.next_deadline_s() == earliest


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
