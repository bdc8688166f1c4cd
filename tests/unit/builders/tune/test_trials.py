"""Trials: what their ends mean, and that no end of an engine is an end of the build."""

import json
import signal
from pathlib import Path

import psutil
import pytest

from builders.evaluate.load_point import Goal
from builders.settings.tune import TuneSettings
from builders.tune.search import Failed, FailureKind, Measured
from builders.tune.trial import TrialOrder, TrialResult, failure_of_exit, failure_of_text, outcome_of
from builders.tune.trial_runner import TrialRunner, trial_limit_s, write_ring
from serve.artifacts.certificates import LoadPoint
from serve.core.parallel import ParallelLayout
from tests.doubles.install import double_environ, double_path

QUICKSTART = Path(__file__).resolve().parents[4] / "serve" / "models" / "quickstart"
GOAL = Goal(1.0, 0.1, 95.0)
TUNE = TuneSettings(prompt_tokens=16, output_tokens=4, trial_s=0.1, ttft_ms=60_000, tpot_ms=60_000)


def order(tmp_path: Path, kind: str = "transformers", **section: object) -> TrialOrder:
    write_ring(tmp_path / "ring.json", [range(10, 60)])
    return TrialOrder.model_validate(
        {
            "kind": kind,
            "section": section,
            "model_dir": QUICKSTART,
            "layout": ParallelLayout(),
            "launcher": "in_process",
            "tune": TUNE.model_dump(),
            "first": 1,
            "ring": tmp_path / "ring.json",
        }
    )


def point(concurrency: int, goodput: float, within: float) -> LoadPoint:
    return LoadPoint(
        concurrency=concurrency,
        requests=10,
        seconds=1.0,
        output_tokens_per_s=goodput,
        goodput_tokens_per_s=goodput,
        ttft_p50_s=0.1,
        ttft_p95_s=0.1,
        tpot_p50_s=0.01,
        tpot_p95_s=0.01,
        within_limits=within,
        relative_error=0.03,
    )


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", FailureKind.OUT_OF_MEMORY),
        ("[TensorRT-LLM][ERROR] CUDA runtime error in cudaMalloc: out of memory", FailureKind.OUT_OF_MEMORY),
        ("terminate called after throwing an instance of 'std::bad_alloc'", FailureKind.OUT_OF_MEMORY),
        ("RuntimeError: DefaultCPUAllocator: can't allocate memory: cannot allocate memory", FailureKind.OUT_OF_MEMORY),
        ("MemoryError", FailureKind.OUT_OF_MEMORY),
        ("engine: a KV cache of 9 blocks of 32 tokens does not fit the memory", FailureKind.OUT_OF_MEMORY),
        ("RuntimeError: CUDA error: an illegal memory access was encountered", FailureKind.CRASHED),
        ("AssertionError", FailureKind.CRASHED),
    ],
)
def test_messages_of_libraries_are_understood(text: str, kind: FailureKind) -> None:
    assert failure_of_text(text) is kind


def test_ends_of_processes_are_understood() -> None:
    killed = failure_of_exit(-signal.SIGKILL, "loading\n")
    assert (killed.failure, "main memory" in killed.reason) == (FailureKind.OUT_OF_MEMORY, True)
    crashed = failure_of_exit(-signal.SIGSEGV, "loading\nlast words\n\n")
    assert (crashed.failure, crashed.reason) == (
        FailureKind.CRASHED,
        "its process ended with signal SIGSEGV: last words",
    )
    assert failure_of_exit(14, "").reason == "its process ended with exit status 14: it printed nothing"
    assert failure_of_exit(1, "CUDA out of memory\nAborted").failure is FailureKind.OUT_OF_MEMORY


def test_outcome_is_the_best_load_that_met_the_goal() -> None:
    result = TrialResult(points=(point(4, 40.0, 1.0), point(16, 100.0, 0.99), point(32, 300.0, 0.5)))
    assert outcome_of(result, GOAL, 16) == Measured(True, 100.0, 0.03, filled=True)
    assert outcome_of(result, GOAL, 64) == Measured(True, 100.0, 0.03, filled=False)
    slow = point(1, 5.0, 0.0).model_copy(update={"tpot_p95_s": 0.4})
    assert outcome_of(TrialResult(points=(slow,)), GOAL, None) == Measured(False, 0.25, 0.03, filled=True)
    failed = TrialResult(failure=FailureKind.TIMED_OUT, reason="slow")
    assert outcome_of(failed, GOAL, 16) == Failed(FailureKind.TIMED_OUT, "slow")


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let trials find a double of TensorRT-LLM."""
    for name, value in double_environ("newest").items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(double_path("newest"))


@pytest.mark.usefixtures("double")
def test_trial_measures_an_engine_in_a_process_of_its_own(tmp_path: Path) -> None:
    result = TrialRunner(tmp_path).run(1, order(tmp_path, "trtllm", max_batch_size=2, context_tokens=512), 120.0)
    assert (result.failure, result.reason) == (None, "")
    assert result.engine.startswith("tensorrt-llm ")
    assert result.points[0].concurrency == 1
    assert result.start_s > 0


@pytest.mark.usefixtures("double")
def test_settings_that_the_engine_refuses_are_an_answer(tmp_path: Path) -> None:
    wrong = order(tmp_path, "trtllm").model_copy(update={"model_dir": tmp_path / "nowhere"})
    result = TrialRunner(tmp_path).run(1, wrong, 120.0)
    assert result.failure is FailureKind.REFUSED
    assert "config.json" in result.reason


def test_a_process_that_takes_too_long_is_ended_with_all_it_started(tmp_path: Path) -> None:
    result = TrialRunner(tmp_path).run(1, order(tmp_path, num_threads=1), 0.3)
    assert result.failure is FailureKind.TIMED_OUT
    assert "0 s" in result.reason
    assert not [child for child in psutil.Process().children(recursive=True) if _is_trial(child)]


def _is_trial(process: psutil.Process) -> bool:
    try:
        return "builders.tune.trial_process" in process.cmdline()
    except psutil.Error:
        return False


def test_time_limit_covers_every_load_and_the_start() -> None:
    assert trial_limit_s(TUNE, 5, 100.0) > 100.0 + 5 * 2 * TUNE.trial_s
    assert trial_limit_s(TUNE, 6) > trial_limit_s(TUNE, 5)


def test_ring_is_all_texts_one_after_the_other(tmp_path: Path) -> None:
    assert write_ring(tmp_path / "ring.json", [(1, 2), (3,)]) == [1, 2, 3]
    assert json.loads((tmp_path / "ring.json").read_bytes()) == [1, 2, 3]
