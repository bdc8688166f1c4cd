"""What follows a start that failed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.core.launch_chain import FailedStart, Fault, NextStart, after_failure, first_link

faults = st.sampled_from(Fault)
counts = st.integers(1, 10)


def failed(fault: Fault, failures: int = 1, *, link: int = 0, stained: bool = False) -> FailedStart:
    return FailedStart(link, fault, failures, stained)


@pytest.mark.parametrize(
    ("start", "links", "then"),
    [
        (failed(Fault.BUNDLE), 3, NextStart(1, reject=True)),
        (failed(Fault.BUNDLE, stained=True), 3, NextStart(None, reject=True)),
        (failed(Fault.NODE), 3, NextStart(1)),
        (failed(Fault.NODE, stained=True), 3, NextStart(None, reject=True)),
        (failed(Fault.ENGINE), 3, NextStart(0)),
        (failed(Fault.ENGINE, 2), 3, NextStart(1, reject=True)),
        (failed(Fault.ENGINE, stained=True), 3, NextStart(None)),
        (failed(Fault.ENGINE, 2, stained=True), 3, NextStart(None, reject=True)),
        (failed(Fault.OPERATOR), 3, NextStart(1)),
        (failed(Fault.SURROUNDINGS), 3, NextStart(0)),
        (failed(Fault.SURROUNDINGS, 2), 3, NextStart(1)),
        (failed(Fault.ENGINE), 1, NextStart(None)),
        (failed(Fault.BUNDLE, link=2), 3, NextStart(None, reject=True)),
    ],
)
def test_what_is_tried_after_a_failure(start: FailedStart, links: int, then: NextStart) -> None:
    assert after_failure(start, links, max_failures=2) == then


@given(faults, st.integers(1, 4), counts, st.booleans())
def test_every_chain_comes_to_an_end(fault: Fault, links: int, max_failures: int, stained: bool) -> None:
    link, failures, tries = 0, 0, 0
    while True:
        tries, failures = tries + 1, failures + 1
        then = after_failure(FailedStart(link, fault, failures, stained), links, max_failures)
        if then.link is None:
            break
        assert then.link in (link, link + 1)
        failures = 0 if then.link > link else failures
        link = then.link
    assert tries <= links * max_failures
    assert stained <= (tries == 1)


@given(faults, st.integers(0, 2), counts, st.booleans(), counts)
def test_only_a_bundle_that_failed_for_good_is_rejected(
    fault: Fault, link: int, failures: int, stained: bool, max_failures: int
) -> None:
    then = after_failure(FailedStart(link, fault, failures, stained), 3, max_failures)
    if then.reject:
        assert fault in (Fault.BUNDLE, Fault.ENGINE) or (fault is Fault.NODE and stained)
        assert then.link != link


def test_a_new_replica_begins_behind_what_was_rejected() -> None:
    assert first_link(["b", "a", None], []) == 0
    assert first_link(["b", "a", None], ["b"]) == 1
    assert first_link(["b", "a", None], ["a", "b"]) == 2
    assert first_link([None], ["b"]) == 0
    assert first_link(["b"], ["b"]) is None
