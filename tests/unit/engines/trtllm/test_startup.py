"""Start and end of the library's object: in threads, in bounded time, with a word now and then."""

import asyncio
import logging
import subprocess
import sys
import threading
from typing import Any

import pytest

from serve.engines.trtllm.daemon_threads import Errands, call_in_thread
from serve.engines.trtllm.startup import (
    LIBRARY_LOGGER,
    Progress,
    construct_in_thread,
    shut_down_in_thread,
    stage_of,
)
from serve.errors import BundleMismatch, ConfigError, EngineDead

DEADLINE_S = 10.0


class Llm:
    """Stands for an LLM object."""

    def __init__(self, release: threading.Event | None = None) -> None:
        self.release = release
        self.is_down = threading.Event()

    def shutdown(self) -> None:
        if self.release is not None:
            self.release.wait(DEADLINE_S)
        self.is_down.set()


async def test_trap_7_2_10_construction_has_a_thread_without_an_event_loop() -> None:
    def construct() -> str:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        return threading.current_thread().name

    assert await construct_in_thread(construct, Progress(5), 5) == "trtllm-start"


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (ValueError("LLM got invalid argument: foo"), ConfigError, "invalid argument: foo"),
        (TypeError("unexpected keyword"), ConfigError, "unexpected keyword"),
        (RuntimeError("Only 1 GPUs are available, but 2 are required."), ConfigError, "parallel"),
        (RuntimeError("Executor worker died during initialization"), EngineDead, "worker died"),
        (SystemExit(3), EngineDead, "SystemExit"),
        (ConfigError("ours"), ConfigError, "ours"),
        (BundleMismatch("ours"), BundleMismatch, "ours"),
    ],
)
async def test_a_failure_to_start_is_told_by_who_has_to_act(
    raised: BaseException, expected: type[Exception], message: str
) -> None:
    def construct() -> Any:
        raise raised

    with pytest.raises(expected, match=message):
        await construct_in_thread(construct, Progress(5), 5)


async def test_a_start_that_takes_too_long_is_given_up_and_cleaned_up() -> None:
    release, llm = threading.Event(), Llm()

    def construct() -> Llm:
        logging.getLogger(LIBRARY_LOGGER).warning("Loading weights concurrently")
        release.wait(DEADLINE_S)
        return llm

    with pytest.raises(EngineDead, match=r"last seen: load.*start_timeout_s"):
        await construct_in_thread(construct, Progress(0.05), 0.05)
    release.set()
    assert await asyncio.to_thread(llm.is_down.wait, DEADLINE_S)


async def test_a_cancelled_start_shuts_down_what_comes_later() -> None:
    release, llm, begun = threading.Event(), Llm(), threading.Event()

    def construct() -> Llm:
        begun.set()
        release.wait(DEADLINE_S)
        return llm

    starting = asyncio.ensure_future(construct_in_thread(construct, Progress(60), 60))
    await asyncio.to_thread(begun.wait, DEADLINE_S)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    release.set()
    assert await asyncio.to_thread(llm.is_down.wait, DEADLINE_S)


@pytest.mark.parametrize(
    ("line", "stage"),
    [
        ("Downloading the model from HuggingFace", "download"),
        ("Loading weights: 12/30 shards", "load"),
        ("[Autotuner] Autotuning process starts ...", "autotune"),
        ("Creating CUDA graph instances for 11 batch sizes.", "graph capture"),
        ("[MemUsageChange] Allocated 42.3 GiB for max tokens in paged KV cache", "KV cache"),
        ("Building TensorRT engine", "build"),
        ("Setting PMI version", None),
    ],
)
def test_stages_of_a_start(line: str, stage: str | None) -> None:
    assert stage_of(line) == stage


def test_a_start_is_not_silent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    now_s = 100.0
    progress = Progress(600, now=lambda: now_s)
    log = logging.Logger(LIBRARY_LOGGER)
    log.addHandler(progress)
    log.info("Loading weights")
    log.info("Loading weights still")
    now_s = 125.0
    progress.tick()
    now_s = 131.0
    progress.tick()
    progress.tick()
    log.info("Autotuning process starts")
    told = [record.getMessage() for record in caplog.records]
    assert [line.split(": ")[1] for line in told] == [
        "load, after 0 s of at most 600 s.",
        "load, after 31 s of at most 600 s.",
        "autotune, after 31 s of at most 600 s.",
    ]
    assert progress.elapsed_s == 31.0


async def test_trap_7_3_19_a_shutdown_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()
    stuck, quick = Llm(release), Llm()
    assert not await shut_down_in_thread(stuck, 0.02)
    assert "has to be ended" in caplog.text
    assert await shut_down_in_thread(quick, DEADLINE_S)
    release.set()


async def test_a_shutdown_that_fails_is_over() -> None:
    class Broken:
        def shutdown(self) -> None:
            raise RuntimeError("already gone")

    assert await shut_down_in_thread(Broken(), DEADLINE_S)


def test_trap_7_1_5_a_process_has_one_engine_ever() -> None:
    code = """
from serve.engines.trtllm.startup import claim_process
from serve.errors import ConfigError
claim_process()
try:
    claim_process()
except ConfigError as exc:
    print("refused:", exc)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "only one" in found.stdout


async def test_a_thread_that_never_returns_does_not_keep_the_process() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await call_in_thread(lambda: threading.Event().wait(DEADLINE_S), "stuck")
    (stuck,) = [thread for thread in threading.enumerate() if thread.name == "stuck"]
    assert stuck.daemon


def test_errands_run_in_the_background_and_one_that_blocks_holds_up_no_other() -> None:
    errands, release, done = Errands("errand", threads=2), threading.Event(), threading.Event()
    errands.send(lambda: print(release.wait(DEADLINE_S)))
    errands.send(done.set)
    assert done.wait(DEADLINE_S)
    release.set()
    errands.stop()
