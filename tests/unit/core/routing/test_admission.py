"""Admission: at once while there is room, in turn when there is not."""

from serve.core.fair_queue import Waiting
from serve.core.routing.admission import Admission
from serve.core.routing.fairness import FairnessSettings
from serve.core.routing.settings import parse_policy
from tests.unit.core.routing.views import view

SETTINGS = FairnessSettings(full_waiting=2, max_queued=3)
LITTLE = 0.01  # tokens, so that prompts are no reason to be full


def ask(admission: Admission, number: int, waiting: list[float], now_s: float = 0.0, tenant: str = "a") -> str:
    """Return what happens to a request."""
    if admission.passes(now_s):
        return "passed"
    gone = admission.look(view(len(waiting), waiting=waiting), 0, LITTLE, now_s)
    if admission.passes(now_s):
        return "looked"
    offer = admission.offer(Waiting(number, tenant, 1.0), now_s)
    assert not gone
    return "refused" if offer.refused is not None and offer.refused.number == number else "waits"


def test_one_look_serves_as_many_as_there_are_places() -> None:
    admission = Admission(SETTINGS)
    assert [ask(admission, number, [0.0, 0.0]) for number in range(4)] == ["looked", "passed", "passed", "passed"]
    assert ask(admission, 4, [2.0, 2.0]) == "waits"
    assert ask(admission, 5, [2.0, 2.0]) == "waits"


def test_a_look_grows_old() -> None:
    admission = Admission(SETTINGS)
    assert ask(admission, 0, [0.0], 0.0) == "looked"
    assert ask(admission, 1, [0.0], 0.051) == "looked"


def test_nobody_overtakes_those_who_wait() -> None:
    admission = Admission(SETTINGS)
    assert ask(admission, 0, [2.0]) == "waits"
    assert ask(admission, 1, [2.0]) == "waits"
    assert [request.number for request in admission.look(view(1, waiting=[1.0]), 0, LITTLE, 0.0)] == [0]
    assert not admission.passes(0.0)
    assert [request.number for request in admission.look(view(1, waiting=[0.0]), 0, LITTLE, 0.0)] == [1]
    assert admission.passes(0.0)


def test_requests_on_the_way_take_places() -> None:
    admission = Admission(SETTINGS)
    admission.offer(Waiting(0, "a", 1.0), 0.0)
    assert admission.look(view(1, waiting=[0.0]), 2, LITTLE, 0.0) == []
    assert len(admission.look(view(1, waiting=[0.0]), 1, LITTLE, 0.0)) == 1


def test_a_fleet_without_replicas_keeps_nobody_waiting() -> None:
    admission = Admission(SETTINGS)
    assert ask(admission, 0, []) == "looked"
    admission.offer(Waiting(1, "a", 1.0), 0.0)
    assert len(admission.look(view(0), 0, LITTLE, 0.0)) == 1


def test_who_is_alone_is_not_held_up() -> None:
    admission = Admission(SETTINGS)
    assert admission.unrivalled("a", 0, 0.0)
    assert admission.unrivalled("a", 0, 1.0)
    assert not admission.unrivalled("b", 0, 2.0)
    assert not admission.unrivalled("b", 0, 601.0)
    assert admission.unrivalled("b", 0, 602.0)
    assert not admission.unrivalled("b", 1, 700.0)
    assert not Admission(FairnessSettings(weights={"a": 2.0})).unrivalled("a", 0, 0.0)


def test_nobody_overtakes_those_who_wait_even_if_rivalry_ends() -> None:
    admission = Admission(SETTINGS)
    admission.unrivalled("a", 0, 0.0)
    admission.unrivalled("b", 0, 0.0)
    admission.offer(Waiting(0, "a", 1.0), 0.0)
    assert not admission.unrivalled("b", 0, 1000.0)


def test_a_full_queue_refuses() -> None:
    admission = Admission(SETTINGS)
    assert [ask(admission, number, [2.0]) for number in range(4)] == ["waits", "waits", "waits", "refused"]


def test_a_section_of_every_policy_may_have_fairness() -> None:
    settings = parse_policy({"policy": "llm_d", "fairness": {"weights": {"acme": 3}, "priorities": 0}})
    assert settings.fairness.limits.weights == {"acme": 3.0}
    assert settings.fairness.limits.highest_class == settings.fairness.limits.lowest_class == 0
