"""`raytrt simulate`, from its arguments to what it prints."""

import json
import re
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.cli import main as raytrt
from serve.core.request_log import LoggedRequest, RequestLogFormat, pack_hashes
from sim.cli import main
from sim.progress import Progress

QUICK = ["--jobs", "1"]


@pytest.fixture
def chats(tmp_path: Path) -> str:
    """A workload of a few seconds."""
    stream = {
        "arrivals": {"per_s": 4},
        "system_prompts": {"count": 3, "tokens": {"mean": 400}},
        "turns": 3,
        "message_tokens": {"mean": 100},
        "output_tokens": {"mean": 20},
        "gap_s": 1,
    }
    path = tmp_path / "chats.yaml"
    path.write_text(yaml.safe_dump({"name": "chats", "duration_s": 20, "streams": [stream]}))
    return str(path)


def test_a_table_has_a_row_for_each_policy_and_fleet(chats: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert raytrt(["simulate", "--trace", chats, "--replicas", "1,2", "--policy", "round_robin,dynamo", *QUICK]) == 0
    title, _, head, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("chats: ")
    assert "llama-3.1-8b fp8 on 1 x H100" in title
    assert head.split()[:2] == ["policy", "replicas"]
    assert [row.split()[:2] for row in rows] == [[p, n] for n in ("1", "2") for p in ("round_robin", "dynamo")]
    assert len({len(row) for row in [head, *rows]}) == 1


def test_json_says_everything_and_nothing_undefined(chats: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--trace", chats, "--json", "--recommend", "--policy", "round_robin,dynamo", *QUICK]) == 0
    document = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [result["policy"] for result in document["results"]] == ["round_robin", "dynamo"]
    assert document["results"][0]["dollars_per_1m_tokens"] is None
    assert document["results"][0]["finished"] == document["workload"]["requests"]
    assert document["recommendations"][0]["config_line"].startswith("routing: {policy: ")
    assert document["measured"] is None


def test_several_processes_give_the_same_results(chats: str, capsys: pytest.CaptureFixture[str]) -> None:
    tables = []
    for jobs in ("1", "2"):
        assert main(["--trace", chats, "--policy", "dynamo,predictive,round_robin", "--jobs", jobs]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]


def test_the_configured_policy_is_simulated_first_and_stays_if_nothing_is_better(
    chats: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # One replica: all policies do the same.
    model = {"id": "m", "engine": "simulated", "replicas": 1, "routing": "least_tokens"}
    config = tmp_path / "config.yaml"
    args = {"models": [model]}
    config.write_text(yaml.safe_dump({"applications": [{"import_path": "serve.app:build_app", "args": args}]}))
    options = ["--trace", chats, "--config", str(config), "--policy", "round_robin", "--recommend", *QUICK]
    assert main(options) == 0
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines()[3:5]] == [["least_tokens", "1"], ["round_robin", "1"]]
    assert "recommended for 1 replica:\n  routing: {policy: least_tokens}\n" in out
    assert "against round_robin: goodput" in out


def test_a_log_is_set_against_its_simulation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = RequestLogFormat()
    requests = [
        LoggedRequest(
            100.0 + n, n, 32, 64, output_tokens=11, prompt_hashes=pack_hashes([1, 2]), ttft_s=0.01, duration_s=0.06
        )
        for n in range(20)
    ]
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"".join(lines.encode(request) for request in requests))
    assert main(["--trace", str(path), "--policy", "round_robin", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "measured, 20 requests: TTFT p50 10 ms, p90 10 ms; TPOT p50 5.0 ms, p90 5.0 ms" in out
    assert "round_robin x1, simulated / measured: TTFT p50 0." in out


def test_a_picture_is_drawn(chats: str, tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    assert main(["--trace", chats, "--policy", "round_robin,dynamo", "--plot", str(path), *QUICK]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_of_many_results_the_best_are_drawn(chats: str, tmp_path: Path) -> None:
    path = tmp_path / "out.svg"
    options = ["--trace", chats, "--policy", "all", "--limit", "40", "--plot", str(path)]
    assert main([*options, *QUICK]) == 0
    assert "the best 10 of " in path.read_text()


def test_without_names_all_policies_are_candidates_but_those_that_the_workload_gives_nothing_to_do(
    chats: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--trace", chats, "--recommend", "--limit", "20", "--json", *QUICK]) == 0
    names = [result["policy"] for result in json.loads(capsys.readouterr().out)["results"]]
    assert {"predictive", "round_robin", "session_affinity"} <= set(names)
    assert "lora_affinity" not in names
    assert any(name.startswith("predictive:") for name in names)


def test_a_picture_needs_matplotlib(
    chats: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["--trace", chats, "--policy", "round_robin", "--plot", "x.png", *QUICK]) == 2
    assert "--plot needs matplotlib: pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--policy", "best"], "--policy: there is no 'best'; there are predictive, round_robin, "),
        (["--policy", "dynamo:x=1"], "--policy dynamo:x=1: .dynamo.x: there is no such setting"),
        (["--policy", "dynamo:temperature"], "'temperature' in 'dynamo:temperature' is no key=value; write dynamo:"),
        (["--policy", ","], "names no policy; there are predictive"),
        (["--replicas", "4,x"], "--replicas=4,x: 'x' is no positive whole number; write for instance 4,8,16"),
        (["--config", "absent.yaml"], "absent.yaml: No such file or directory"),
        (["--slo", "absent.yaml"], "absent.yaml: No such file or directory"),
        (
            ["--plot", "out.unknown", "--policy", "random"],
            "--plot out.unknown: .*give the name of a .png, .svg or .pdf",
        ),
    ],
)
def test_mistakes_are_told(
    chats: str, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--trace", chats, *arguments, *QUICK]) == 2
    error = capsys.readouterr().err
    assert error.startswith("raytrt simulate: ")
    assert re.search(complaint, error)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--rate", "0"], "--rate: '0' is not above 0"),
        (["--rate", "fast"], "--rate: 'fast' is no number"),
        (["--delay-ms", "-1"], "--delay-ms: '-1' is below 0"),
        (["--ttft-ms", "inf"], "--ttft-ms: 'inf' is no finite number"),
        (["--limit", "1.5"], "--limit: '1.5' is no positive whole number"),
        (["--gpu", "h1000"], "invalid choice: 'h1000'"),
    ],
)
def test_arguments_out_of_range_are_told(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--trace", "x", *arguments])
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err


class Terminal(StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "tells"), [(Terminal(), True), (StringIO(), False)])
def test_progress_is_for_terminals_only(stream: Any, tells: bool) -> None:
    progress = Progress(stream)
    progress.started("dynamo x4", 1000)
    progress.advanced(256, 30.0)
    progress.finished(1, 2, "dynamo x4")
    progress.close()
    told = stream.getvalue()
    assert bool(told) == tells
    assert ("1/2 simulations, the last one dynamo x4" in told) == tells
    assert ("dynamo x4: 256/1000 requests, 30 s of traffic" in told) == tells
