"""The commands of a user: Ray's own `serve run` and `serve deploy` without our flags, changes live."""

import copy
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.integration.serving import Serving

BIN = Path(sys.executable).parent
SMALL = {"num_cpus": 0.05}
ARGS: dict[str, Any] = {
    "models": [
        {
            "id": "sim",
            "engine": {"kind": "simulated", "latency": {"kind": "fixed", "decode_step_s": 0.01}},
            "resources": SMALL,
            "replicas": 2,
        }
    ],
    "gateway": {"num_cpus": 0.05, "replicas": 2},
}
DEADLINE_S = 200.0  # of a machine that is busy with other tests


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """`serve run CONFIG`, as someone does who knows Ray and nothing of ours."""
    # Beside other tests: `serve run` joins whatever Ray happens to run on this machine, unless it is told not to.
    alone = {"RAY_ADDRESS": "local"}
    serving = Serving(copy.deepcopy(ARGS), tmp_path_factory.mktemp("plain"), ("serve", "run"), alone)
    try:
        serving.wait_until_ready()
        yield serving
    finally:
        serving.end()


def ask(serving: Serving, **fields: Any) -> tuple[int, dict[str, Any]]:
    body = json.dumps({"model": "sim", "prompt": "x", "max_tokens": 5, "temperature": 0} | fields).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{serving.url}/v1/completions", data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, json.loads(exc.read())


def deploy(serving: Serving) -> None:
    """`serve deploy` what `serving.document` says now."""
    serving.write_config()
    found = re.search(r"http://[\w.]+:\d+", serving.log())
    assert found, serving.log()
    command = [str(BIN / "serve"), "deploy", str(serving.config_path), "-a", found[0]]
    # A Ray that `serve run` started wants a token, which lies in the user's home; `serve deploy` has to be told.
    environ = os.environ | {"RAY_AUTH_MODE": "token"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait for what other processes do; nothing announces it here."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.1)


def test_serve_run_without_our_flags_works_and_says_once_a_gateway_what_it_costs(plain: Serving) -> None:
    status, answer = ask(plain)
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 5
    eventually(lambda: plain.log().count("eval") >= 1, "nothing was said")
    assert 1 <= plain.log().count('eval "$(raytrt env)"') <= 2


def test_limits_change_live_and_a_mistake_changes_nothing(plain: Serving) -> None:
    pids = plain.replica_pids("gateway")
    application = plain.document["applications"][0]
    application["deployments"] = [{"name": "gateway", "user_config": {"max_body_bytes": 100}}]
    deploy(plain)
    eventually(lambda: {ask(plain, prompt="x" * 200)[0] for _ in range(8)} == {413}, "the limit did not arrive")
    application["deployments"] = [{"name": "gateway", "user_config": {"max_body_bites": 1}}]
    deploy(plain)
    eventually(lambda: "max_body_bites: there is no such setting" in plain.log(), "the mistake was not reported")
    assert ask(plain, prompt="x" * 200)[0] == 413
    application["deployments"] = [{"name": "gateway", "user_config": {}}]
    deploy(plain)
    eventually(lambda: {ask(plain, prompt="x" * 200)[0] for _ in range(8)} == {200}, "the limit stayed")
    assert plain.replica_pids("gateway") == pids


def test_replacing_every_replica_cuts_no_stream_and_refuses_no_request(plain: Serving) -> None:
    before = set(plain.replica_pids("model-sim"))
    whole = ask(plain, max_tokens=500)[1]["choices"][0]["text"]
    outcomes: list[tuple[int, dict[str, Any]]] = []
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            outcomes.append(ask(plain, max_tokens=500))

    model = plain.document["applications"][0]["args"]["models"][0]
    model["limits"] = {"drain_timeout_s": 120}
    model["engine"]["max_waiting"] = 99
    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(keep_asking) for _ in range(8)]
        try:
            deploy(plain)
            eventually(lambda: replaced(before, set(plain.replica_pids("model-sim"))), "nothing was replaced")
        finally:
            stop.set()
    for client in clients:
        client.result()
    assert {status for status, _ in outcomes} == {200}
    assert {answer["choices"][0]["text"] for _, answer in outcomes} == {whole}


def replaced(before: set[int], now: set[int]) -> bool:
    return len(now) == 2 and before.isdisjoint(now)


def test_a_model_that_cannot_start_is_reported_and_ends_up(tmp_path: Path) -> None:
    args = copy.deepcopy(ARGS)
    args["models"][0]["replicas"] = args["gateway"]["replicas"] = 1
    args["models"][0]["engine"]["faults"] = [{"kind": "fail_start", "times": 100}]
    serving = Serving(args, tmp_path)
    try:
        assert serving.process.wait(DEADLINE_S) == 1
        assert "sim does not start: simulated fault" in serving.log()
        assert "giving up" in serving.log()
        assert "Traceback" not in serving.log()
    finally:
        serving.end()


def test_a_layout_without_room_ends_up_with_the_reason(tmp_path: Path) -> None:
    model = {"id": "big", "engine": "trtllm", "parallel": {"tensor": 2}}
    serving = Serving({"models": [model], "gateway": {"num_cpus": 0.05}}, tmp_path)
    try:
        assert serving.process.wait(120) == 1
        last = serving.log().strip().splitlines()[-1]
        assert last.startswith(
            "raytrt: models[big].parallel: no room for tensor=2 x pipeline=1: it takes one node with"
        )
        assert "start Ray on GPU nodes" in last
    finally:
        serving.end()


@pytest.mark.parametrize("command", ["up", "check"])
def test_a_bad_config_ends_at_once_with_file_key_and_remedy(tmp_path: Path, command: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("applications: [{import_path: 'serve.app:build_app', args: {models: [{id: m, replica: 2}]}}]")
    done = subprocess.run([BIN / "raytrt", command, path], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"{path}: applications[0].args.models[0].replica: there is no such setting" in done.stderr


def test_serve_build_writes_a_config_that_serve_can_read(tmp_path: Path) -> None:
    output = tmp_path / "built.yaml"
    subprocess.run([BIN / "serve", "build", "serve.quickstart:app", "-o", output], check=True, capture_output=True)
    assert "name: model-quickstart" in output.read_text()


def test_the_flags_can_be_evaluated_by_a_shell() -> None:
    line = f'eval "$({BIN}/raytrt env)" && echo $RAY_SERVE_ENABLE_HA_PROXY'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
