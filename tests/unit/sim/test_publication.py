"""What replicas publish is true, and comes as often as in production."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.core.routing.load import LoadReport
from serve.engines.simulated.scheduler import Scheduler
from serve.engines.simulated.timeline import Timeline
from sim.options import SimOptions
from sim.publication import KvMessage, LoadMessage, Message
from sim.replica import SimReplica, SimSequence
from tests.unit.sim.fleets import SIZE, engine

OPTIONS = SimOptions()


class OneByOne(Timeline[SimSequence]):
    """A timeline that never takes steps together: what the real one has to agree with."""

    def _begin(self, now_s: float) -> None:
        super()._begin(now_s)
        if self._run is not None:
            self._end_s = now_s + self._run.first_s
            self._run = None


def sequence(number: int, prompt_tokens: int, output_tokens: int) -> SimSequence:
    hashes = [1000 * number + block for block in range(prompt_tokens // SIZE)]
    made = SimSequence("", prompt_tokens, hashes, root=0, max_tokens=output_tokens)
    made.number = made.route_id = number
    made.expected_tokens = prompt_tokens
    return made


class Heard:
    """Takes a replica's messages, as a network without delay would bring them."""

    def __init__(self, options: SimOptions = OPTIONS, decode_step_s: float = 0.013) -> None:
        self.messages: list[Message] = []
        self.replica = SimReplica(0, engine(decode_step_s=decode_step_s), options, self.messages.append)

    def play(self, arrivals: list[tuple[float, int, int]], until_s: float) -> None:
        """Let sequences of (when, prompt, output) arrive, and the engine run until `until_s`."""
        for number, (at_s, prompt_tokens, output_tokens) in enumerate(arrivals):
            if at_s <= until_s:
                self._run(at_s)
                self.replica.submit(sequence(number, prompt_tokens, output_tokens), at_s)
        self._run(until_s)

    def _run(self, until_s: float) -> None:
        while self.replica.next_s <= until_s and self.replica.next_s < math.inf:
            self.replica.advance(self.replica.next_s)

    def load(self, at_s: float) -> LoadReport:
        """Return what is known at a moment."""
        loads = [message for message in self.messages if isinstance(message, LoadMessage) and message.at_s <= at_s]
        return loads[-1].report(at_s) if loads else LoadReport()


arrivals = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 120), st.integers(1, 60)), min_size=1, max_size=6)


@settings(max_examples=100)
@given(drawn=arrivals, at_ms=st.integers(0, 1500))
def test_a_message_can_tell_what_decoding_changes_until_the_next_event(
    drawn: list[tuple[int, int, int]], at_ms: int
) -> None:
    # Steps take whole milliseconds: nothing comes at the very moment at which one ends.
    workload = [(at / 100 + 37e-5 * i, prompt, output) for i, (at, prompt, output) in enumerate(sorted(drawn))]
    at_s = at_ms / 500 + 13e-5
    prompt = SimOptions(load_interval_s=1e-9, progress_interval_s=1e-9, kv_interval_s=1e-9)
    together, one_by_one = Heard(prompt), Heard(prompt)
    one_by_one.replica.timeline = OneByOne(
        Scheduler(one_by_one.replica.limits, engine(decode_step_s=0.013).latency.make_model())
    )
    together.play(workload, at_s)
    one_by_one.play(workload, at_s)
    said, true = together.load(at_s), one_by_one.load(at_s)
    for name in LoadReport.__struct_fields__:
        if name not in ("used_blocks", "accepted"):  # blocks that output fills are told at the next event
            assert getattr(said, name) == pytest.approx(getattr(true, name), rel=1e-9), name


def test_load_is_told_at_once_after_a_pause_and_then_not_more_often_than_the_interval() -> None:
    heard = Heard()
    heard.play([(1.0, 10, 200), (1.001, 10, 200), (1.01, 10, 200), (1.5, 10, 200)], 1.52)
    sent = [message.at_s for message in heard.messages if isinstance(message, LoadMessage)]
    assert sent[0] == 1.0
    gaps = [later - earlier for earlier, later in pairwise(sent)]
    assert min(gaps) >= OPTIONS.load_interval_s - 1e-12
    accepted = [message.accepted for message in heard.messages if isinstance(message, LoadMessage)]
    assert [number for numbers in accepted for number in numbers] == [0, 1, 2, 3]
    assert accepted[0] == [0]


def test_while_it_decodes_reports_keep_to_a_grid_that_the_next_event_respects() -> None:
    heard = Heard()
    heard.play([(0.0, 10, 1000), (5.0, 10, 1000)], 5.001)
    *_, before, last = [message for message in heard.messages if isinstance(message, LoadMessage)]
    assert before.goes_on
    since_report_s = (5.0 - before.at_s) % OPTIONS.progress_interval_s
    expected = max(5.0, 5.0 - since_report_s + OPTIONS.load_interval_s)
    assert last.at_s == pytest.approx(expected)


def test_events_of_the_cache_are_gathered_for_their_interval() -> None:
    heard = Heard(decode_step_s=0.0001)
    heard.play([(0.0, 20, 1), (0.001, 20, 1), (0.002, 20, 1), (1.0, 20, 1)], math.inf)
    messages = [message for message in heard.messages if isinstance(message, KvMessage)]
    # Prompts are complete at 0.02, and the two that came meanwhile at 0.06; the last at 1.02.
    assert [message.at_s for message in messages] == pytest.approx([0.02, 0.06, 1.02])
    stored = [len(event.block_hashes) for message in messages for event in message.events]
    assert sum(stored) == 8


def test_a_message_that_was_heard_is_not_added_to() -> None:
    heard = Heard()
    heard.play([(0.0, 10, 5)], 0.0)
    first = heard.messages[0]
    assert isinstance(first, LoadMessage)
    first.is_sent = True
    heard.replica.submit(sequence(7, 10, 5), 0.0)
    second = heard.messages[1]
    assert isinstance(second, LoadMessage)
    assert (first.accepted, second.accepted) == ([0], [7])
    assert second.at_s == OPTIONS.load_interval_s
