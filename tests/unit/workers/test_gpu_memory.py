"""GPU memory: what is waited for, and for how long."""

from collections.abc import Iterator

import pytest

from serve.workers.gpu_memory import (
    GpuMemory,
    parse_nvidia_smi,
    used_gpu_memory,
    wait_for_gpu_memory,
    warn_unwatched,
)

GIB = 2**30


def test_it_waits_until_memory_is_as_before() -> None:
    readings: Iterator[GpuMemory] = iter([{"0": 9 * GIB, "1": GIB}, {"0": 5 * GIB, "1": GIB}, {"0": GIB, "1": GIB}])
    held = wait_for_gpu_memory(
        {"0": GIB, "1": GIB}, ("0", "1"), tolerance_bytes=0, limit_s=60.0, used=lambda: next(readings)
    )
    assert held == ()
    assert next(readings, None) is None


def test_what_is_held_is_named_when_time_is_over() -> None:
    held = wait_for_gpu_memory(
        {"0": GIB, "1": GIB}, ("0", "1"), tolerance_bytes=GIB, limit_s=0.0, used=lambda: {"0": 9 * GIB, "1": 2 * GIB}
    )
    assert held == ("GPU 0: 9.0 GiB in use, 1.0 before the start",)


def test_gpus_that_nobody_knows_are_passed_over() -> None:
    def never() -> GpuMemory:
        raise AssertionError

    assert wait_for_gpu_memory({}, ("0",), tolerance_bytes=0, limit_s=60.0, used=never) == ()


def test_nvidia_smi_is_read_by_index_and_uuid() -> None:
    text = "0, GPU-5a, 1024\n1, GPU-5b, [N/A]\n2, GPU-5c, 0\n"
    assert parse_nvidia_smi(text) == {"0": GIB, "GPU-5a": GIB, "2": 0, "GPU-5c": 0}


def test_this_machine_answers() -> None:
    assert all(size >= 0 for size in used_gpu_memory().values())


def test_memory_that_cannot_be_watched_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    warn_unwatched.cache_clear()
    warn_unwatched()
    warn_unwatched()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "nvidia-ml-py" in caplog.text
