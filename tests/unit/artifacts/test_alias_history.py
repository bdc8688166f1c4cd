"""What replicas learn from the history of an alias."""

from hypothesis import given
from hypothesis import strategies as st

from serve.artifacts.alias_history import bundle_before, rejected_bundles
from serve.artifacts.port import AliasMove


def move(to: str, rejected: str | None = None) -> AliasMove:
    return AliasMove(to, "2026-01-01T00:00:00Z", rejected=rejected)


histories = st.lists(st.builds(move, st.sampled_from("abcd"), st.none() | st.sampled_from("abcd")), max_size=12)


def test_a_rejected_bundle_may_be_tried_again_once_somebody_has_promoted_it_again() -> None:
    assert rejected_bundles([move("a"), move("b")]) == frozenset()
    assert rejected_bundles([move("a"), move("b"), move("a", rejected="b")]) == {"b"}
    assert rejected_bundles([move("a"), move("b"), move("a", rejected="b"), move("c")]) == {"b"}
    assert rejected_bundles([move("a"), move("b"), move("a", rejected="b"), move("b")]) == frozenset()


def test_the_bundle_before_is_what_was_served_until_then() -> None:
    assert bundle_before([move("a"), move("b"), move("c")], "c") == "b"
    assert bundle_before([move("a"), move("b"), move("c")], "b") == "a"
    assert bundle_before([move("a")], "a") is None
    assert bundle_before([], "a") is None
    assert bundle_before([move("a"), move("b"), move("a", rejected="b"), move("c")], "c") == "a"
    assert bundle_before([move("a"), move("b"), move("a")], "x") == "a"


@given(histories, st.sampled_from("abcd"))
def test_it_is_never_the_bundle_itself_nor_one_that_failed(history: list[AliasMove], fingerprint: str) -> None:
    before = bundle_before(history, fingerprint)
    assert before != fingerprint
    if before is not None:
        assert before not in {entry.rejected for entry in history}
        assert before in {entry.fingerprint for entry in history}


@given(histories)
def test_what_an_alias_points_to_is_rejected_by_its_own_move_at_most(history: list[AliasMove]) -> None:
    if history and history[-1].rejected != history[-1].fingerprint:
        assert history[-1].fingerprint not in rejected_bundles(history)
