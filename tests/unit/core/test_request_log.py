import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.core.request_log import LoggedRequest, RequestLogFormat, pack_hashes, pseudonym, unpack_hashes

hashes = st.lists(st.integers(0, 2**64 - 1), max_size=20)


@given(prompt=hashes, output=hashes, rest=st.integers(0, 15), text=st.text(max_size=20), ttft_s=st.floats(0, 100))
def test_a_line_says_what_was_logged(prompt: list[int], output: list[int], rest: int, text: str, ttft_s: float) -> None:
    request = LoggedRequest(
        arrival_s=1.5,
        route_id=2**64 - 1,
        tokens_per_block=16,
        prompt_tokens=16 * len(prompt) + max(rest, not prompt),
        prompt_hashes=pack_hashes(prompt),
        output_hashes=pack_hashes(output),
        tenant=text,
        ttft_s=ttft_s,
    )
    lines = RequestLogFormat()
    line = lines.encode(request)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    read = lines.decode(line)
    assert read == request
    assert unpack_hashes(read.prompt_hashes) == prompt


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{", "truncated"),
        (b"[]", "Expected `object`"),
        (b'{"arrival_s":1,"route_id":1,"tokens_per_block":16}', "missing required field `prompt_tokens`"),
        (b'{"arrival_s":1,"route_id":1,"tokens_per_block":16,"prompt_tokens":3,"version":9}', "version=9"),
        (b'{"arrival_s":1,"route_id":1,"tokens_per_block":0,"prompt_tokens":3}', "must be positive"),
        (
            b'{"arrival_s":1,"route_id":1,"tokens_per_block":1,"prompt_tokens":3,"prompt_hashes":"AAAA"}',
            "3 bytes; 3 tok",
        ),
        (b'{"arrival_s":1,"route_id":1,"tokens_per_block":9,"prompt_tokens":3,"output_hashes":"AAAA"}', "has 3 bytes"),
    ],
)
def test_what_is_no_line_of_a_log_is_refused(line: bytes, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        RequestLogFormat().decode(line)


def test_names_are_not_written() -> None:
    assert pseudonym("alice") != pseudonym("bob")
    assert pseudonym("alice") == pseudonym("alice")
    assert "alice" not in pseudonym("alice")
    assert pseudonym("") == ""
