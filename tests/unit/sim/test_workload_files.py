"""Readers of traces: what they make of good lines, and what they say of bad ones."""

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serve.core.request_log import LoggedRequest, RequestLogFormat, pack_hashes
from serve.errors import ConfigError
from sim.text_file import TraceError
from sim.workload import SimRequest, Workload, make_workload
from sim.workload_file import FORMATS, Format, read_workload

MOONCAKE = [
    {"timestamp": 3000, "input_length": 1100, "output_length": 7, "hash_ids": [0, 1, 5]},
    {"timestamp": 1000, "input_length": 600, "output_length": 3, "hash_ids": [0, 4]},
]
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,70,109\n"
)


def mooncake(path: Path, *changes: dict[str, Any]) -> Path:
    lines = [{**line, **change} for line, change in zip(MOONCAKE, (*changes, {}, {}), strict=False)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_mooncake_ids_are_blocks_and_the_last_partial_one_is_none(tmp_path: Path) -> None:
    workload = read_workload(mooncake(tmp_path / "talk.jsonl"))
    assert (workload.name, workload.tokens_per_block, workload.duration_s) == ("talk", 512, 2.0)
    first, second = workload.requests
    assert (first.arrival_s, first.prompt_tokens, first.output_tokens) == (0.0, 600, 3)
    assert (len(first.hashes), len(second.hashes)) == (1, 2)
    assert second.hashes[0] == first.hashes[0] != second.hashes[1]


def test_mooncake_blocks_can_be_cut_into_smaller_ones(tmp_path: Path) -> None:
    workload = read_workload(mooncake(tmp_path / "talk.jsonl"), tokens_per_block=64)
    first, second = workload.requests
    assert (len(first.hashes), len(second.hashes)) == (600 // 64, 1100 // 64)
    assert first.hashes[:8] == second.hashes[:8]
    assert len({*first.hashes, *second.hashes}) == 9 + 17 - 8
    assert all(0 < block < 1 << 64 for block in second.hashes)


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz"])
def test_packed_files_are_read(tmp_path: Path, suffix: str) -> None:
    plain = mooncake(tmp_path / "talk.jsonl").read_bytes()
    path = tmp_path / f"packed.jsonl{suffix}"
    packers: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress}
    path.write_bytes(packers[suffix](plain))
    assert len(read_workload(path).requests) == 2


def test_a_limit_reads_the_first_lines_only(tmp_path: Path) -> None:
    path = mooncake(tmp_path / "talk.jsonl")
    path.write_text(path.read_text() + "\nno json\n")
    assert [request.prompt_tokens for request in read_workload(path, limit=2).requests] == [600, 1100]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"input_length": 0}, r"bad.jsonl:1: .*input_length=0 .*not 0"),
        ({"output_length": -1}, r"bad.jsonl:1: .*output_length=-1"),
        ({"timestamp": -5}, r"bad.jsonl:1: timestamp=-5"),
        ({"hash_ids": [0, 1]}, r"bad.jsonl:1: hash_ids has 2 ids, but input_length=1100 has 3 blocks of 512 tokens"),
        ({"hash_ids": [0, -1, 2]}, r"bad.jsonl:1: hash_ids must be in"),
        ({"input_length": "many"}, r"bad.jsonl:1: Expected `int`, got `str` - at `\$.input_length`.*like|such as"),
    ],
)
def test_a_bad_line_of_mooncake_is_named(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(TraceError, match=complaint):
        read_workload(mooncake(tmp_path / "bad.jsonl", change))


def test_a_block_size_that_does_not_divide_mooncakes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="tokens_per_block=48 does not divide the trace's blocks of 512; use 512"):
        read_workload(mooncake(tmp_path / "talk.jsonl"), tokens_per_block=48)


def test_azure_prompts_share_nothing(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)
    workload = read_workload(path, tokens_per_block=16)
    first, second = workload.requests
    assert (first.prompt_tokens, first.output_tokens) == (374, 44)
    assert second.arrival_s == pytest.approx(4.314579, abs=1e-6)
    assert (len(first.hashes), len(second.hashes)) == (23, 4)
    assert not set(first.hashes) & set(second.hashes)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("2023-11-16 18:15:46,374", r"azure.csv:2: 2 columns instead of 3; each line must be like 2023-11-16"),
        ("yesterday,374,1", r"azure.csv:2: Invalid isoformat string: 'yesterday"),
        ("2023-11-16 18:15:46,0,1", r"azure.csv:2: ContextTokens=0 must be positive"),
        ("2023-11-16 18:15:46,1.5,1", r"azure.csv:2: .*'1.5'"),
    ],
)
def test_a_bad_line_of_azure_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(AZURE.splitlines()[0] + "\n" + line + "\n")
    with pytest.raises(TraceError, match=complaint):
        read_workload(path, tokens_per_block=16)


def logged(number: int, **changes: Any) -> LoggedRequest:
    fields: dict[str, Any] = {
        "arrival_s": 1.7e9 + number,
        "route_id": number,
        "tokens_per_block": 16,
        "prompt_tokens": 70,
        "output_tokens": 60,
        "prompt_hashes": pack_hashes([1, 2, 3, 4]),
        "output_hashes": pack_hashes([5, 6, 7, 8]),
        "session": "abc",
        "model": "m",
        "ttft_s": 0.5,
        "duration_s": 2.0,
    }
    return LoggedRequest(**{**fields, **changes})


def log(path: Path, *requests: LoggedRequest) -> Path:
    lines = RequestLogFormat()
    path.write_bytes(b"".join(lines.encode(request) for request in requests))
    return path


def test_a_request_log_is_replayed(tmp_path: Path) -> None:
    workload = read_workload(log(tmp_path / "requests.jsonl", logged(3), logged(1, max_tokens=90)))
    assert workload.tokens_per_block == 16
    assert [request.arrival_s for request in workload.requests] == [0.0, 2.0]
    first = workload.requests[0]
    assert (list(first.hashes), list(first.output_hashes)) == ([1, 2, 3, 4], [5, 6, 7, 8])
    assert (first.max_tokens, first.session, first.measured_ttft_s) == (90, "abc", 0.5)


def test_larger_blocks_take_the_last_hash_of_those_they_consist_of(tmp_path: Path) -> None:
    path = log(tmp_path / "requests.jsonl", logged(1, prompt_tokens=80, prompt_hashes=pack_hashes([1, 2, 3, 4, 5])))
    request = read_workload(path, tokens_per_block=32).requests[0]
    # Blocks of 32: 1-2 and 3-4 in the prompt, then 5 with the first of the output's.
    assert list(request.hashes) == [2, 4]
    assert list(request.output_hashes) == [5, 7]


def test_too_few_hashes_of_the_output_are_no_hashes_of_it(tmp_path: Path) -> None:
    path = log(tmp_path / "requests.jsonl", logged(1, output_hashes=pack_hashes([5])))
    assert read_workload(path).requests[0].output_hashes == []


def test_prompts_of_unknown_content_share_nothing(tmp_path: Path) -> None:
    path = log(tmp_path / "requests.jsonl", *(logged(n, prompt_hashes=b"", output_hashes=b"") for n in (1, 2)))
    one, other = read_workload(path).requests
    assert len({*one.hashes, *other.hashes}) == 8


@pytest.mark.parametrize(
    ("second", "complaint"),
    [
        (logged(2, model="n"), r"log.jsonl:2: a request to 'n' after one to 'm'; choose by --log-model"),
        (
            logged(2, tokens_per_block=32, prompt_hashes=pack_hashes([1, 2])),
            r"log.jsonl:2: tokens_per_block=32 after 16",
        ),
        (logged(2, prompt_hashes=pack_hashes([1])), r"log.jsonl:2: prompt_hashes has 8 bytes; 70 tokens .* 4 hashes"),
        (logged(2, prompt_tokens=0), r"log.jsonl:2: prompt_tokens"),
    ],
)
def test_a_bad_line_of_a_log_is_named(tmp_path: Path, second: LoggedRequest, complaint: str) -> None:
    with pytest.raises(TraceError, match=complaint):
        read_workload(log(tmp_path / "log.jsonl", logged(1), second))


def test_a_line_that_was_cut_off_is_left_out_with_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = log(tmp_path / "log.jsonl", logged(1), logged(2))
    path.write_bytes(path.read_bytes()[:-30])
    assert len(read_workload(path).requests) == 1
    assert "log.jsonl:2: this line is not complete" in caplog.text


def test_the_logs_of_all_gateways_are_one(tmp_path: Path) -> None:
    paths = [
        log(tmp_path / f"requests-{name}.jsonl", *(logged(n) for n in numbers))
        for name, numbers in (("a", (1, 4)), ("b", (3, 2)))
    ]
    workload = read_workload(paths, limit=3)
    assert [request.arrival_s for request in workload.requests] == [0.0, 1.0, 2.0]
    with pytest.raises(TraceError, match=r"b.jsonl: only a request log may be several files, and .*talk.jsonl is none"):
        read_workload([mooncake(tmp_path / "talk.jsonl"), paths[1]])


def test_a_request_that_failed_is_given_an_output_of_mean_length(tmp_path: Path) -> None:
    path = log(
        tmp_path / "requests.jsonl",
        logged(1),
        logged(2, output_tokens=20),
        logged(3, output_tokens=0, output_hashes=b""),
        logged(4, output_tokens=0, output_hashes=b"", max_tokens=5),
    )
    assert [request.output_tokens for request in read_workload(path).requests] == [60, 20, 40, 5]


def test_one_model_of_a_log_can_be_chosen(tmp_path: Path) -> None:
    path = log(tmp_path / "log.jsonl", logged(1), logged(2, model="n", tokens_per_block=8, prompt_hashes=b""))
    assert len(read_workload(path, model="n").requests[0].hashes) == 8
    with pytest.raises(TraceError, match="no requests to 'x'"):
        read_workload(path, model="x")
    with pytest.raises(TraceError, match="tokens_per_block=24 is no multiple of the log's 16"):
        read_workload(path, tokens_per_block=24, model="m")


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("x.jsonl", "hello\n", r"x.jsonl:1: this is no trace of Mooncake .* by --format, one of mooncake, azure, log"),
        ("x.jsonl", "", r"x.jsonl:1: this is no trace"),
        ("x.csv", "TIMESTAMP,Tokens\n", r"x.csv:1: the first line must be TIMESTAMP,ContextTokens,GeneratedTokens"),
        ("x.csv", AZURE.splitlines()[0] + "\n", r"x.csv: it has no requests"),
        ("x.yaml", "seed: -1\nstreams: []\n", r"(?s)x.yaml: .seed: .*\n.*x.yaml: .streams: .*at least 1"),
        ("x.jsonl.xz", "no xz", r"x.jsonl.xz: cannot be read: "),
        ("x.jsonl.gz", "no gz", r"x.jsonl.gz: cannot be read: "),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, name: str, text: str, complaint: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        read_workload(tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"absent.jsonl: cannot be read: No such file"):
        read_workload(tmp_path / "absent.jsonl")


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "synthetic"])
def test_an_empty_file_of_any_kind_is_refused(tmp_path: Path, kind: Format) -> None:
    path = tmp_path / "empty"
    path.write_text("")
    with pytest.raises(TraceError, match=r"empty:?.*"):
        read_workload(path, kind, tokens_per_block=512)


def test_requests_are_put_in_order_and_can_come_faster() -> None:
    workload = make_workload("w", [SimRequest(at_s, 10, 1) for at_s in (7.0, 5.0, 6.0)], 16)
    assert [request.arrival_s for request in workload.faster(2.0).requests] == [0.0, 0.5, 1.0]
    assert workload.first(2).duration_s == 1.0
    assert workload.first(None) is workload
    assert Workload("none", (), 16).duration_s == 0.0
