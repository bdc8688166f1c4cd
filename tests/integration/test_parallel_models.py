"""Models on several ranks, behind one `raytrt up`: the same tokens, ranks that are killed, fallbacks, nothing left."""

import json
import signal
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import psutil
import pytest

from serve.workers.processes import GROUP_VARIABLE, GroupMark
from tests.doubles.install import double_environ
from tests.integration.serving import Serving

SMALL = {"num_cpus": 0.05, "replica_cpus": 0.05}
TORCH = {"kind": "transformers", "num_threads": 1}
QUESTION = [{"role": "user", "content": "How do I serve on 8 GPUs?"}]
RECOVERY_LIMIT_S = 120.0


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    no_gpu = SMALL | {"num_gpus": 0}  # the double of TensorRT-LLM computes on the CPU
    running = Serving(
        {
            "models": [
                {"id": "whole", "engine": TORCH, "resources": SMALL},
                {"id": "split", "engine": TORCH, "parallel": {"tensor": 2}, "resources": SMALL},
                {"id": "trtllm", "engine": "trtllm", "resources": no_gpu},
                {
                    "id": "falls",
                    "engine": {"kind": "simulated", "faults": [{"kind": "fail_start"}]},
                    "fallback": TORCH,
                    "resources": SMALL,
                },
            ],
            "gateway": {"num_cpus": 0.05},
        },
        tmp_path_factory.mktemp("parallel"),
        environ=double_environ("newest"),
    )
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.end()


def ask(serving: Serving, model: str) -> tuple[str, dict[str, str]]:
    """Return the answer to the question, and the headers it came with."""
    body = {"model": model, "messages": QUESTION, "temperature": 0}
    request = urllib.request.Request(
        f"{serving.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer: dict[str, Any] = json.load(response)
        return answer["choices"][0]["message"]["content"], {k.lower(): v for k, v in response.headers.items()}


def ranks_of(serving: Serving, owner: int | None = None) -> list[psutil.Process]:
    """Return the processes of ranks, of all groups or of the one that a replica owns, in rank order."""
    found = []
    for process in serving.processes():
        try:
            mark = GroupMark.from_text(process.environ()[GROUP_VARIABLE])
            name = process.name()
        except (psutil.Error, KeyError):
            continue
        if mark.rank is not None and name.startswith("ray::") and owner in (None, mark.owner_pid):
            found.append((mark.rank, process))
    return [process for _, process in sorted(found, key=lambda entry: entry[0])]


def test_every_engine_gives_the_same_answer(serving: Serving) -> None:
    whole, headers = ask(serving, "whole")
    assert len(whole) > 20
    assert "x-raytrt-fallback" not in headers
    for model in ("split", "trtllm", "falls"):
        assert ask(serving, model)[0] == whole, model


def test_a_fallback_says_so(serving: Serving) -> None:
    assert ask(serving, "falls")[1]["x-raytrt-fallback"].startswith("transformers ")
    deadline_s = time.monotonic() + 30
    while not serving.get("/health")[1]["fallbacks"] and time.monotonic() < deadline_s:
        time.sleep(0.2)  # asked of the replicas every two seconds; nothing announces it
    assert set(serving.get("/health")[1]["fallbacks"]) == {"falls"}
    assert 'raytrt_fallback_active{model="falls"} 1.0' in serving.get("/metrics")[1]
    assert "falls does not start (try 2 of 2): simulated fault" in serving.log()


def test_a_killed_rank_has_its_group_replaced(serving: Serving) -> None:
    before, _ = ask(serving, "split")
    replica = serving.replica_pids("model-split")[0]
    ranks = ranks_of(serving, replica)
    assert len(ranks) == 2
    with openai.OpenAI(base_url=f"{serving.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        stream = client.completions.create(
            model="split", prompt="Once", max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        ranks[1].send_signal(signal.SIGKILL)
        with pytest.raises(openai.APIError):
            for _ in stream:
                pass
    _, alive = psutil.wait_procs(ranks, timeout=30)
    assert not alive, "a rank outlived its group"
    deadline_s = time.monotonic() + RECOVERY_LIMIT_S
    while serving.replica_pids("model-split") in ([], [replica]) and time.monotonic() < deadline_s:
        time.sleep(0.2)  # Serve replaces it; nothing announces it
    serving.wait_until_ready()
    assert ask(serving, "split")[0] == before


def test_ctrl_c_ends_everything_that_was_started(serving: Serving) -> None:
    everything = serving.processes()
    assert ranks_of(serving)
    assert {"raylet", "haproxy"} <= serving.process_names()
    serving.interrupt()
    _, alive = psutil.wait_procs(everything, timeout=30)
    assert not alive
    assert serving.get("/health")[0] == 0
