from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.core.request import FinishReason, TokenDelta
from serve.errors import EngineDead
from serve.ingress.detokenize import DetokenizerFactory
from serve.ingress.sequence import Piece, SequenceText, ShownToken
from tests.unit.ingress.fake_backend import logprobs_of
from tests.unit.ingress.tiny_model import train_tokenizer

TOKENIZER = train_tokenizer()
FACTORY = DetokenizerFactory(TOKENIZER)
TEXTS = st.lists(st.sampled_from(["stop", "st", "o", "p", " ", "世", "😀", "hello "]), max_size=12).map("".join)
STOPS = st.lists(st.sampled_from(["stop", "p ", "世", "😀h", "o "]), max_size=2)
ENDS = st.sampled_from([FinishReason.STOP, FinishReason.LENGTH])


def deltas_of(token_ids: Sequence[int], sizes: Sequence[int], end: FinishReason) -> list[TokenDelta]:
    groups, start = [], 0
    for size in [*sizes, len(token_ids)]:
        groups.append(tuple(token_ids[start : start + size]))
        start += size
    return [
        TokenDelta(
            group,
            logprobs=logprobs_of(group, 1),
            finish_reason=end if number == len(groups) - 1 else None,
            stop_token_id=2 if number == len(groups) - 1 and end is FinishReason.STOP else None,
        )
        for number, group in enumerate(groups)
    ]


def run(sequence: SequenceText, deltas: Sequence[TokenDelta]) -> Piece:
    """Feed deltas as the gateway does, and join what comes."""
    text, count = "", 0
    tokens: list[ShownToken] = []
    for delta in deltas:
        piece = sequence.feed(delta)
        text += piece.text
        tokens.extend(piece.tokens)
        count += piece.num_tokens
        if piece.finish_reason is not None:
            break
    return Piece(text, tokens, sequence.finish_reason, count)


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return ids


@given(
    text=TEXTS,
    stops=STOPS,
    sizes=st.lists(st.integers(0, 4), max_size=6),
    end=ENDS,
    with_logprobs=st.booleans(),
    min_tokens=st.integers(0, 6),
    include_stop=st.booleans(),
)
def test_grouping_of_tokens_changes_nothing(
    text: str,
    stops: list[str],
    sizes: list[int],
    end: FinishReason,
    with_logprobs: bool,
    min_tokens: int,
    include_stop: bool,
) -> None:
    def fresh() -> SequenceText:
        return SequenceText(
            FACTORY.make(), stops, include_stop=include_stop, min_tokens=min_tokens, with_logprobs=with_logprobs
        )

    ids = ids_of(text)
    one_by_one = run(fresh(), deltas_of(ids, [1] * len(ids), end))
    grouped = run(fresh(), deltas_of(ids, sizes, end))
    assert grouped == one_by_one


@given(text=TEXTS, stops=STOPS, sizes=st.lists(st.integers(0, 4), max_size=6), end=ENDS)
def test_logprobs_are_those_of_the_text_that_is_shown(
    text: str, stops: list[str], sizes: list[int], end: FinishReason
) -> None:
    ids = ids_of(text)
    shown = run(SequenceText(FACTORY.make(), stops, with_logprobs=True), deltas_of(ids, sizes, end))
    assert [token.token_id for token in shown.tokens] == ids[: len(shown.tokens)]
    assert all(token.logprob is not None and token.logprob.token_id == token.token_id for token in shown.tokens)
    covered = b"".join(FACTORY.bytes_of[token.token_id] for token in shown.tokens)
    assert covered.startswith(shown.text.encode())
    for token in shown.tokens:
        data = FACTORY.bytes_of[token.token_id]
        at = text[token.text_offset :].encode()
        assert data in at[: len(data) + 3]  # up to three bytes of its character may come before
    if not any(stop in text for stop in stops):
        assert shown.text == text
        assert len(shown.tokens) == len(ids) == shown.num_tokens


@given(text=TEXTS, stops=STOPS, sizes=st.lists(st.integers(0, 4), max_size=6), end=ENDS)
def test_logprobs_come_no_later_than_the_text_they_belong_to(
    text: str, stops: list[str], sizes: list[int], end: FinishReason
) -> None:
    sequence = SequenceText(FACTORY.make(), stops, with_logprobs=True)
    shown_text, shown_bytes = "", b""
    for delta in deltas_of(ids_of(text), sizes, end):
        piece = sequence.feed(delta)
        shown_text += piece.text
        shown_bytes += b"".join(FACTORY.bytes_of[token.token_id] for token in piece.tokens)
        assert shown_bytes.startswith(shown_text.encode())
        if piece.finish_reason is not None:
            break


def test_tokens_after_a_stop_string_do_not_count() -> None:
    ids = ids_of("hello stop hello hello")
    shown = run(SequenceText(FACTORY.make(), ["stop"]), deltas_of(ids, [len(ids)], FinishReason.LENGTH))
    assert shown.text == "hello "
    assert shown.finish_reason == "stop"
    assert shown.num_tokens < len(ids)
    assert TOKENIZER.decode(ids[: shown.num_tokens]).startswith("hello stop")


def test_a_stop_string_is_shown_when_asked_for() -> None:
    ids = ids_of("hello stop hello")
    sequence = SequenceText(FACTORY.make(), ["stop"], include_stop=True)
    assert run(sequence, deltas_of(ids, [], FinishReason.LENGTH)).text == "hello stop"


def test_a_stop_token_is_shown_when_asked_for() -> None:
    sequence = SequenceText(FACTORY.make(skip_special_tokens=False), include_stop=True)
    assert run(sequence, deltas_of(ids_of("hello"), [], FinishReason.STOP)).text == "hello<|eos|>"


def test_held_back_text_is_shown_at_the_end() -> None:
    ids = ids_of("hello sto")
    sequence = SequenceText(FACTORY.make(), ["stop"])
    pieces = [sequence.feed(delta).text for delta in deltas_of(ids, [len(ids)], FinishReason.LENGTH)]
    assert pieces == ["hello ", "sto"]


def test_a_cancelled_sequence_is_no_answer() -> None:
    with pytest.raises(EngineDead):
        SequenceText(FACTORY.make()).feed(TokenDelta(finish_reason=FinishReason.CANCELLED))
