"""A worker group of the transformers engine on the GPUs of one machine: rank actors in a placement group, NCCL, a kill.

    python -m benchmarks.group_on_gpus --degree 2

Starts Ray here; needs its core only. `--device cpu` does the same over gloo, on the quickstart model only.
First the quickstart model in float32: its greedy tokens have to be those of one rank. Then a Llama-3.1-8B-shaped model
of random weights: start, speed, and what becomes of streams, processes and GPU memory when a rank is killed under them;
another group in the same place has to give the same tokens.
"""

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from benchmarks.report import Report
from benchmarks.transformers_tensor_parallel import LARGE, make_model, prompt_of
from serve.core.parallel import ParallelLayout
from serve.core.placement import PlacementPlan, actor_options, plan_placement
from serve.core.request import GenerateRequest, SamplingParams, pack_tokens
from serve.engines.transformers.settings import TransformersSettings
from serve.errors import EngineDead
from serve.logs import configure_logging
from serve.workers.gpu_memory import used_gpu_memory
from serve.workers.group import WorkerGroup
from serve.workers.group_settings import GroupSettings
from serve.workers.launchers.torch_distributed import TorchDistributedLauncher
from serve.workers.nodes import RayNodes
from serve.workers.processes import marked_processes
from serve.workers.rank_program import make_program

QUICKSTART = Path(__file__).parents[1] / "serve/models/quickstart"
STREAMS, TOKENS, GIB = 16, 64, 2**30


class Holder:
    """What a replica is to a worker group.

    Args:
        plan: What was reserved.
        settings: Of the engine.
        model_dir: Its checkpoint.
    """

    def __init__(self, plan: PlacementPlan, settings: TransformersSettings, model_dir: str) -> None:
        configure_logging()
        watch = GroupSettings()
        self._launcher = TorchDistributedLauncher(plan, make_program(settings, Path(model_dir)), watch)
        self._group = WorkerGroup(self._launcher, watch, nodes=RayNodes())

    async def start(self) -> float:
        """Start the group; returns the seconds it took."""
        began_s = time.monotonic()
        await self._group.start()
        return time.monotonic() - began_s

    async def tokens(self, prompts: list[list[int]], max_tokens: int) -> tuple[list[list[int]], float]:
        """Return greedy continuations, computed together, and the seconds that took."""
        began_s = time.monotonic()
        found = await asyncio.gather(*(self._tokens(i, prompt, max_tokens) for i, prompt in enumerate(prompts)))
        return found, time.monotonic() - began_s

    async def _tokens(self, number: int, prompt: list[int], max_tokens: int) -> list[int]:
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        request = GenerateRequest(f"{time.monotonic()}-{number}", "m", pack_tokens(prompt), sampling)
        return [token async for delta in self._group.generate(request) for token in delta.token_ids]

    async def kill_a_rank(self, prompts: list[list[int]]) -> dict[str, float]:
        """Kill the last rank under streams; returns seconds after it, and GiB in use, by what happened."""
        streams = [asyncio.ensure_future(self._tokens(i, prompt, 2000)) for i, prompt in enumerate(prompts)]
        while self._group.stats().running < len(prompts):  # noqa: ASYNC110  # an engine announces nothing
            await asyncio.sleep(0.01)
        held = sum((await asyncio.to_thread(used_gpu_memory)).values())
        os.kill(self._launcher.ranks()[-1].pid, signal.SIGKILL)
        began_s = time.monotonic()
        ended = await asyncio.gather(*streams, return_exceptions=True)
        cut_s = time.monotonic() - began_s
        assert all(isinstance(end, EngineDead) for end in ended), ended
        await self._group.wait_until_stopped()
        stopped_s = time.monotonic() - began_s
        left = sum((await asyncio.to_thread(used_gpu_memory)).values())
        processes = float(
            len([pid for pid in marked_processes(lambda mark: mark.group == self._group.id) if pid != os.getpid()])
        )
        return {"cut": cut_s, "stopped": stopped_s, "held": held / GIB, "left": left / GIB, "processes": processes}

    async def stop(self) -> None:
        """End the group in order."""
        await self._group.stop()


def hold(degree: int, gpus: bool, settings: TransformersSettings, model_dir: Path) -> tuple[Any, Any]:
    """Reserve what a group of so many ranks takes, and make its holder in the first bundle."""
    rank = {"CPU": 1.0, "GPU": 1.0} if gpus else {"CPU": 0.1}
    plan = plan_placement(ParallelLayout(tensor=degree), "torch_distributed", replica={"CPU": 0.1}, rank=rank)
    group = ray.util.placement_group([dict(bundle) for bundle in plan.bundles], strategy=plan.strategy)
    ray.get(group.ready())
    where = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
    options = {**actor_options(plan.replica), "scheduling_strategy": where}
    return ray.remote(Holder).options(**options).remote(plan, settings, str(model_dir)), group


def equal_tokens(degree: int, gpus: bool) -> float:
    """Return the share of greedy tokens of the quickstart model that are those of one rank, in float32."""
    settings = TransformersSettings(
        device="cuda" if gpus else "cpu", dtype="float32", num_threads=1, kv_cache_tokens=8192
    )
    prompts = [prompt_of(seed, 20 + seed, 3000) for seed in range(8)]
    found = []
    for ranks in (1, degree):
        holder, group = hold(ranks, gpus, settings, QUICKSTART)
        ray.get(holder.start.remote())
        found.append(ray.get(holder.tokens.remote(prompts, TOKENS))[0])
        ray.get(holder.stop.remote())
        ray.kill(holder)
        ray.util.remove_placement_group(group)
    pairs = [a == b for one, other in zip(*found, strict=True) for a, b in zip(one, other, strict=True)]
    return float(sum(pairs) / len(pairs))


def fail_and_return(report: Report, degree: int, gpus: bool, model_dir: Path) -> None:
    """Measure one group's start and speed, kill a rank of it, and start another in the same bundles."""
    tokens = 65536 if gpus else 8192
    settings = TransformersSettings(device="cuda" if gpus else "cpu", num_threads=1, kv_cache_tokens=tokens)
    prompts = [prompt_of(seed, 200, 3000) for seed in range(STREAMS)]
    holder, group = hold(degree, gpus, settings, model_dir)
    start_s = ray.get(holder.start.remote())
    before, took_s = ray.get(holder.tokens.remote(prompts, TOKENS))
    fault = ray.get(holder.kill_a_rank.remote(prompts))
    ray.kill(holder)
    ray.util.remove_placement_group(group)
    holder, _ = hold(degree, gpus, settings, model_dir)
    again_s = ray.get(holder.start.remote())
    after, _ = ray.get(holder.tokens.remote(prompts, TOKENS))
    ray.get(holder.stop.remote())
    report.add("start", start_s, "s")
    report.add(f"{STREAMS} streams", STREAMS * TOKENS / took_s, "tokens/s")
    report.add("kill -9 of a rank: all streams cut", fault["cut"], "s", "<= 3")
    report.add("kill -9 of a rank: memory free, group stopped", fault["stopped"], "s")
    report.add("GPU memory in use before the kill", fault["held"], "GiB")
    report.add("GPU memory in use once stopped", fault["left"], "GiB")
    report.add("processes left", fault["processes"], "", "<= 0")
    report.add("another group in the same place: start", again_s, "s")
    report.add("its greedy tokens are the first one's", float(before == after), "share", ">= 1")


def main() -> int:
    """Run it all; 1 if something does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--degree", type=int, default=2)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args()
    gpus = options.device == "cuda"
    ray.init("local", include_dashboard=False, log_to_driver=True)
    report = Report("group_on_gpus", " ".join(["python -m benchmarks.group_on_gpus", *sys.argv[1:]]))
    share = equal_tokens(options.degree, gpus)
    report.add("quickstart, float32: greedy tokens are those of one rank", share, "share", ">= 1")
    with tempfile.TemporaryDirectory() as directory:
        model_dir = QUICKSTART
        if gpus:
            model_dir = Path(directory)
            make_model(model_dir, LARGE, "cuda")
        fail_and_return(report, options.degree, gpus, model_dir)
    print(report.text())
    return int(any(figure.ok is False for figure in report.figures))


if __name__ == "__main__":
    sys.exit(main())
