"""A worker group of two MPI ranks on a double of TensorRT-LLM: `python mpi_group_program.py SIGKILL|SIGSTOP`.

Prints what happens when a rank gets the signal in the middle of a stream. A program of its own, as MPI may end it.
"""

import asyncio
import os
import signal
import sys
from functools import partial
from pathlib import Path

from serve.core.parallel import ParallelLayout
from serve.core.request import GenerateRequest, SamplingParams, pack_tokens
from serve.engines.factory import make_engine
from serve.engines.trtllm.settings import TrtllmSettings
from serve.errors import EngineDead
from serve.workers.group import WorkerGroup
from serve.workers.group_settings import GroupSettings
from serve.workers.launchers.mpi import MpiLauncher

MODEL = Path(__file__).parents[2] / "serve/models/quickstart"
LAYOUT = ParallelLayout(tensor=2)


async def run(name: signal.Signals) -> None:
    make = partial(make_engine, TrtllmSettings(), MODEL, LAYOUT)
    launcher = MpiLauncher(make, LAYOUT)
    group = WorkerGroup(launcher, GroupSettings())
    await group.start()
    print("group", group.id, *(f"rank{process.rank}" for process in launcher.ranks()), flush=True)
    request = GenerateRequest("long", "m", pack_tokens(range(40)), SamplingParams(max_tokens=2000, temperature=0.0))
    deltas = 0
    try:
        async for _ in group.generate(request):
            deltas += 1
            if deltas == 5:
                os.kill(launcher.ranks()[1].pid, name)
    except EngineDead as exc:
        print("dead", exc, flush=True)
    await group.wait_until_stopped()
    print("stopped", flush=True)


if __name__ == "__main__":  # ranks import this module again
    asyncio.run(run(signal.Signals[sys.argv[1]]))
    sys.stdout.flush()
    os._exit(0)
