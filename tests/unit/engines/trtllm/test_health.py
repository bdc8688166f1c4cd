"""What failures mean, and the threads that read the library's queues and ask for its health."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from serve.engines.trtllm.failures import classify
from serve.engines.trtllm.pollers import HealthPoller, QueuePoller

DEADLINE_S = 10.0


class LibraryRequestError(RuntimeError):
    """Stands for TensorRT-LLM's, which is a RuntimeError, too."""


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered",
        "[TensorRT-LLM][ERROR] CUDA runtime error in cudaEventSynchronize: cudaErrorIllegalAddress ILLEGAL_ADDRESS",
        "CUDA error: uncorrectable ECC error encountered",
        "uncorrectable NVLink error detected during the execution",
        "CUDA error: device-side assert triggered",
        "CUDA error: the launch timed out and was terminated",
        "CUDA error: unspecified launch failure",
        "CUDA error: misaligned address",
        "NCCL error: unhandled system error",
        "GPU has fallen off the bus",
    ],
)
def test_trap_2_5_a_request_error_that_names_a_lost_gpu_is_the_end(text: str) -> None:
    assert classify(LibraryRequestError(text), is_request_error=True).is_fatal


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB", "out_of_memory"),
        (
            "CUDA runtime error in cudaMalloc: out of memory (an illegal memory access is not the reason)",
            "out_of_memory",
        ),
        ("The sum of prompt length (99) and query length (1) should not exceed max_num_tokens (64)", "engine_refused"),
        ("launch of the request was refused", "engine_refused"),
    ],
)
def test_trap_2_5_other_request_errors_are_the_requests_own(text: str, code: str) -> None:
    failure = classify(LibraryRequestError(text), is_request_error=True)
    assert not failure.is_fatal
    assert failure.code == code
    assert text in failure.message


@pytest.mark.parametrize("error", [RuntimeError("LLM is shutting down"), AssertionError(), OSError("broken pipe")])
def test_trap_2_5_any_other_exception_is_the_end(error: Exception) -> None:
    failure = classify(error, is_request_error=False)
    assert failure.is_fatal
    assert type(error).__name__ in failure.message


class Queues:
    """Stands for an LLM object: reads are recorded, and answered by scripts."""

    def __init__(self, answer: Callable[[str], Any]) -> None:
        self.answer = answer
        self.threads: set[str] = set()
        self.timeouts: set[float] = set()

    def get_stats(self, timeout: float) -> Any:
        return self._read("stats", timeout)

    def get_kv_cache_events(self, timeout: float) -> Any:
        return self._read("events", timeout)

    def _read(self, what: str, timeout: float) -> Any:
        self.threads.add(threading.current_thread().name)
        self.timeouts.add(timeout)
        return self.answer(what)


class Taken:
    """Counts what a poller hands on."""

    def __init__(self, enough: int) -> None:
        self.enough = enough
        self.records: list[Any] = []
        self.is_enough = threading.Event()

    def __call__(self, records: Any) -> None:
        self.records.extend(records)
        if len(self.records) >= self.enough:
            self.is_enough.set()


def test_trap_7_2_11_one_thread_reads_both_queues_with_short_timeouts() -> None:
    queues = Queues(lambda what: [{"of": what}, '{"of": "json"}'])
    events, stats = Taken(6), Taken(6)
    poller = QueuePoller(queues, events, stats, 0.001, 0.001)
    poller.start()
    assert events.is_enough.wait(DEADLINE_S)
    assert stats.is_enough.wait(DEADLINE_S)
    poller.stop()
    assert poller.join(DEADLINE_S)
    assert queues.threads == {"trtllm-poller"}
    assert max(queues.timeouts) <= 0.05  # trap 7.2.12: a read takes at least as long as its timeout
    assert {record["of"] for record in events.records} == {"events", "json"}


def test_events_that_are_off_are_not_read() -> None:
    asked: list[str] = []

    def answer(what: str) -> Any:
        asked.append(what)
        return [{}]

    stats = Taken(3)
    poller = QueuePoller(Queues(answer), None, stats, 0.001, 0.001)
    poller.start()
    assert stats.is_enough.wait(DEADLINE_S)
    poller.stop()
    assert poller.join(DEADLINE_S)
    assert set(asked) == {"stats"}


def test_a_read_that_fails_is_tried_again_and_does_not_stop_the_other_queue(caplog: pytest.LogCaptureFixture) -> None:
    failures = iter([AssertionError("no request yet"), ["not a record"]])

    def answer(what: str) -> Any:
        if what == "stats":
            return [{}]
        failure = next(failures, [{}])
        if isinstance(failure, Exception):
            raise failure
        return failure

    events, stats = Taken(1), Taken(3)
    poller = QueuePoller(Queues(answer), events, stats, 0.001, 0.001)
    poller.start()
    assert stats.is_enough.wait(DEADLINE_S)
    assert events.is_enough.wait(DEADLINE_S)
    poller.stop()
    assert poller.join(DEADLINE_S)
    assert caplog.text.count("Reading KV events failed") == 1


def test_a_poller_that_never_began_has_ended() -> None:
    poller = QueuePoller(Queues(lambda _: []), None, Taken(1), 1, 1)
    poller.stop()
    assert poller.join(0.0)


class Health:
    """Stands for an LLM object: gives scripted answers, the last for ever."""

    def __init__(self, *answers: bool | Exception) -> None:
        self.answers = list(answers)
        self.asked = threading.Semaphore(0)

    def _check_health(self) -> bool:
        self.asked.release()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.mark.parametrize("answer", [False, RuntimeError("LLM is shutting down")])
def test_an_engine_that_says_no_is_sick_once(answer: bool | Exception) -> None:
    reasons: list[str] = []
    told = threading.Event()

    def on_sick(reason: str) -> None:
        reasons.append(reason)
        told.set()

    poller = HealthPoller(Health(True, True, answer), on_sick, interval_s=0.001)
    poller.start()
    assert told.wait(DEADLINE_S)
    poller._thread.join(DEADLINE_S)
    assert not poller._thread.is_alive()
    assert len(reasons) == 1


def test_a_stopped_health_poller_tells_nothing() -> None:
    health, reasons = Health(True), list[str]()
    poller = HealthPoller(health, reasons.append, interval_s=0.001)
    poller.start()
    assert health.asked.acquire(timeout=DEADLINE_S)
    poller.stop()
    poller._thread.join(DEADLINE_S)
    assert reasons == []
