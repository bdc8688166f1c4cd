from hypothesis import example, given
from hypothesis import strategies as st

from serve.ingress.stop import StopMatcher, failure_function

STOPS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)
PIECES = st.lists(st.text("abc", max_size=6), max_size=12)


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Return the text before the stop string that is complete first, the longest of several, and that string."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(PIECES, STOPS)
@example(["aab", "aab"], ["abaab"])
@example(["ab"], ["b", "ab"])
def test_finds_what_a_search_of_the_whole_text_finds(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = "".join([matcher.feed(piece) for piece in pieces]) + matcher.flush()
    assert (shown, matcher.matched) == naive("".join(pieces), stops)


@given(PIECES, STOPS)
def test_holds_back_what_may_become_a_stop_string_and_no_more(pieces: list[str], stops: list[str]) -> None:
    matcher, shown, received = StopMatcher(stops), "", ""
    for piece in pieces:
        shown += matcher.feed(piece)
        received += piece
        if matcher.matched:
            break
        held = received[len(shown) :]
        longest = max(size for stop in stops for size in range(len(stop)) if received.endswith(stop[:size]))
        assert received == shown + held
        assert len(held) == longest


def test_shows_nothing_after_a_match() -> None:
    matcher = StopMatcher(["stop"])
    assert [matcher.feed(piece) for piece in ("go st", "op on", " and on")] == ["go ", "", ""]
    assert matcher.flush() == ""


def test_a_long_repetitive_stop_string_takes_linear_time() -> None:
    stop = "a" * 1000 + "b"
    matcher = StopMatcher([stop])
    shown = "".join([matcher.feed("a") for _ in range(20_000)])
    assert len(shown) == 19_000
    assert matcher.feed("b") == ""
    assert matcher.matched == stop


@given(st.text("ab", min_size=1, max_size=12))
def test_failure_function_is_the_longest_border(pattern: str) -> None:
    for end, border in enumerate(failure_function(pattern), start=1):
        prefix = pattern[:end]
        assert border == max(size for size in range(end) if prefix.endswith(prefix[:size]))
