"""GPU memory after a kill: how soon the driver gives back what a killed rank held, and whether the group waits for it.

    python -m benchmarks.gpu_memory_release

Needs an NVIDIA GPU and driver, and none of the packages of RayTRT. A rank is a process that holds memory of the GPU and
has a child, in a session of its own, that holds as much.
"""

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from serve.workers.gpu_memory import used_gpu_memory, wait_for_gpu_memory
from serve.workers.processes import GROUP_VARIABLE, GroupMark, kill_group, marked_processes, start_reaper, start_ticks

HELD_GIB = 16
RUNS = 3
LIMIT_S = 30.0
MIB = 2**20


def hold(gib: int, children: int) -> None:
    """Be a rank: allocate, start children that do the same, say so, and sleep."""
    if children:
        line = [sys.executable, "-m", "benchmarks.gpu_memory_release", "hold", str(gib), str(children - 1)]
        child = subprocess.Popen(line, start_new_session=True, stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
    driver = ctypes.CDLL("libcuda.so.1")
    context, address = ctypes.c_void_p(), ctypes.c_uint64()
    for status in (
        driver.cuInit(0),
        driver.cuCtxCreate_v2(ctypes.byref(context), 0, 0),
        driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(gib * 2**30)),
    ):
        assert status == 0, f"CUDA driver error {status}"
    print("held", flush=True)
    time.sleep(600)


def own(gib: int) -> None:
    """Be a replica: start a rank, and live until killed."""
    mark = GroupMark.of_this_process("release")
    start_reaper(mark)
    os.environ[GROUP_VARIABLE] = mark.to_text()
    hold_line = [sys.executable, "-m", "benchmarks.gpu_memory_release", "hold", str(gib), "1"]
    rank = subprocess.Popen(hold_line, stdout=subprocess.PIPE)
    assert rank.stdout is not None
    rank.stdout.readline()
    print("up", flush=True)
    time.sleep(600)


def measure(name: str, kill: Callable[[subprocess.Popen[bytes]], object]) -> None:
    """Let an owner and its rank come up, kill something, and wait for the memory."""
    before = used_gpu_memory()
    owner = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu_memory_release", "own", str(HELD_GIB)], stdout=subprocess.PIPE
    )
    assert owner.stdout is not None
    with owner.stdout as output:
        output.readline()
    held = used_gpu_memory()
    gpu = max((name for name in before if name.isdigit()), key=lambda name: held[name] - before[name])
    ranks = list(marked_processes(lambda mark: mark.group == "release"))
    begin_s = time.monotonic()
    kill(owner)
    while any(start_ticks(pid) for pid in ranks):
        time.sleep(0.001)
    gone_s = time.monotonic() - begin_s
    late = used_gpu_memory()[gpu] - before[gpu]
    left = wait_for_gpu_memory(before, (gpu,), tolerance_bytes=256 * MIB, limit_s=LIMIT_S)
    free_s = time.monotonic() - begin_s
    owner.kill()
    owner.wait()
    told = f"; NOT FREE: {left[0]}" if left else ""
    print(
        f"{name}: {(held[gpu] - before[gpu]) / 2**30:.1f} GiB held; processes gone after {gone_s:.2f} s, "
        f"{late / 2**30:.1f} GiB still in use then; free after {free_s:.2f} s{told}",
        flush=True,
    )


def main() -> None:
    """Run everything."""
    print("$ python -m benchmarks.gpu_memory_release")
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    print(subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip())
    begin_s = time.monotonic()
    used_gpu_memory()
    print(f"asking how much is in use takes {time.monotonic() - begin_s:.3f} s")
    for _ in range(RUNS):
        measure("the group kills its ranks", lambda owner: kill_group("release", LIMIT_S))
    for _ in range(RUNS):
        measure("kill -9 of the replica, then its reaper", lambda owner: owner.kill())


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    if sys.argv[1:2] == ["hold"]:
        hold(int(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1:2] == ["own"]:
        own(int(sys.argv[2]))
    else:
        main()
