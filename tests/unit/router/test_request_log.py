import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.core.blocks import block_hashes
from serve.core.request import FinishReason, PrefillInfo, TokenDelta
from serve.core.request_log import LoggedRequest, RequestLogFormat, unpack_hashes
from serve.ingress.routing_desk import RoutingDesk
from serve.ingress.settings import GatewaySettings
from serve.router.hints import RouteHints
from serve.router.request_log_writer import LogTarget, RequestLogWriter, RotatedFile
from tests.unit.router.boards import SIZE, make_board, prompt, request


def line_of(number: int) -> LoggedRequest:
    return LoggedRequest(arrival_s=float(number), route_id=number, tokens_per_block=16, prompt_tokens=1)


def route_ids(path: Path) -> list[int]:
    read = RequestLogFormat()
    return [read.decode(line).route_id for line in path.read_bytes().splitlines()]


async def test_what_was_taken_is_written_when_the_log_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "made" / "log.jsonl"
    writer = RequestLogWriter()
    writer.write(line_of(0))
    assert not writer.is_open
    writer.set_target(LogTarget(path, 10**6, 2))
    for number in range(1, 100):
        writer.write(line_of(number))
    await writer.close()
    assert route_ids(path) == list(range(1, 100))
    assert writer.dropped == 0


async def test_another_target_gets_what_comes_after(tmp_path: Path) -> None:
    writer = RequestLogWriter()
    targets = [LogTarget(tmp_path / f"{number}.jsonl", 10**6, 2) for number in range(3)]
    for number, target in enumerate(targets):
        writer.set_target(target)
        writer.write(line_of(number))
    await writer.close()
    assert [route_ids(target.path) for target in targets] == [[0], [1], [2]]


async def test_a_disk_that_fails_loses_lines_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    writer = RequestLogWriter()
    writer.set_target(LogTarget(tmp_path / "file" / "log.jsonl", 10**6, 2))
    writer.write(line_of(1))
    await writer.close()
    assert writer.dropped == 1
    assert "missing in the request log" in caplog.text


@given(lengths=st.lists(st.integers(1, 120), max_size=40), max_bytes=st.integers(1, 300), max_files=st.integers(1, 4))
def test_rotation_keeps_the_newest_lines_within_the_limits(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], max_bytes: int, max_files: int
) -> None:
    path = tmp_path_factory.mktemp("rotated") / "log.jsonl"
    file = RotatedFile(LogTarget(path, max_bytes, max_files))
    lines = [b"%d" % (number % 10) * length + b"\n" for number, length in enumerate(lengths)]
    for line in lines:
        file.append(line)
    file.close()
    files = sorted(path.parent.iterdir(), key=lambda one: -int(one.suffix[1:]) if one.suffix[1:].isdigit() else 0)
    assert len(files) <= max_files
    kept = b"".join(one.read_bytes() for one in files)
    assert b"".join(lines).endswith(kept)
    assert all(one.stat().st_size <= max_bytes or one.read_bytes().count(b"\n") == 1 for one in files)
    if len(files) < max_files:
        assert kept == b"".join(lines)


async def run_through_desk(path: Path, tokens: list[int], output: list[int], **settings: object) -> bytes:
    board, _, _ = make_board("app#m#a")
    limits = GatewaySettings(request_log=str(path), **settings)  # type: ignore[arg-type]
    desk = RoutingDesk({"m": board}, lambda: limits, "gw1")
    sequence = request("secret-sequence", tokens, max_tokens=64)
    hints = RouteHints("the-request", session="alice-session", tenant="acme", arrived_s=0.0, limited=False)
    trace = desk.begin(sequence, hints)
    choice = board.choose(sequence)
    assert choice is not None
    board.accepted(sequence.request_id, choice.best[0])
    first = TokenDelta(tuple(output[:1]), prefill=PrefillInfo(cached_tokens=SIZE))
    for delta in (first, TokenDelta(tuple(output[1:])), TokenDelta((), FinishReason.STOP)):
        desk.note(trace, delta, choice.best[0])
    desk.end(trace, sequence, FinishReason.STOP)
    await desk.close()
    return (path.parent / "log.gw1.jsonl").read_bytes()


async def test_a_line_has_sizes_times_and_hashes_and_nothing_that_was_said(tmp_path: Path) -> None:
    tokens = prompt(1)
    text = await run_through_desk(tmp_path / "log.jsonl", tokens, [7, 8, 9])
    logged = RequestLogFormat().decode(text)
    assert (logged.prompt_tokens, logged.output_tokens, logged.max_tokens) == (len(tokens), 3, 0)
    assert (logged.tenant, logged.model, logged.replica, logged.finish_reason) == ("acme", "m", "a", "stop")
    assert (logged.cached_tokens, logged.tokens_per_block) == (SIZE, SIZE)
    assert unpack_hashes(logged.prompt_hashes) == block_hashes(np.array(tokens, np.uint32), SIZE).tolist()
    assert 0 < logged.ttft_s <= logged.duration_s
    values = [value for value in json.loads(text).values() if isinstance(value, str)]
    assert not any("alice" in value or "secret" in value or "request" in value for value in values)
    assert set(json.loads(text)) <= set(LoggedRequest.__struct_fields__)


@given(prompt_tokens=st.integers(1, 70), output_tokens=st.integers(2, 70))
async def test_the_next_turn_of_a_conversation_is_known_by_its_hashes(
    tmp_path_factory: pytest.TempPathFactory, prompt_tokens: int, output_tokens: int
) -> None:
    tokens, output = list(range(prompt_tokens)), list(range(500, 500 + output_tokens))
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    logged = RequestLogFormat().decode(await run_through_desk(path, tokens, output))
    known = unpack_hashes(logged.prompt_hashes) + unpack_hashes(logged.output_hashes)
    next_turn = block_hashes(np.array([*tokens, *output, 1, 2, 3], np.uint32), SIZE).tolist()
    written = (prompt_tokens + output_tokens - 1) // SIZE  # the last token's keys and values were not made
    assert known == next_turn[:written]


async def test_a_log_that_is_turned_on_and_off_live(tmp_path: Path) -> None:
    board, _, _ = make_board("a")
    settings = GatewaySettings()
    desk = RoutingDesk({"m": board}, lambda: settings, "gw1")

    def run(name: str) -> None:
        sequence = request(name, prompt(1))
        trace = desk.begin(sequence, RouteHints(name))
        board.choose(sequence)
        desk.end(trace, sequence, FinishReason.LENGTH)

    run("before")
    settings = GatewaySettings(request_log=str(tmp_path / "log.jsonl"))
    run("during")
    settings = GatewaySettings()
    run("after")
    await desk.close()
    lines = (tmp_path / "log.gw1.jsonl").read_bytes().splitlines()
    assert len(lines) == 1
    assert RequestLogFormat().decode(lines[0]).prompt_tokens == len(prompt(1))
