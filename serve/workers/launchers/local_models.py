"""Checkpoints as local directories on every node of a group: checked, or downloaded, before any GPU is taken.

TensorRT-LLM would download the id of a hub through MPI, also with the Ray orchestrator, and takes every string that is
no local path for such an id.
"""

import asyncio
import importlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve.errors import ConfigError

logger = logging.getLogger(__name__)

_CHECK_LIMIT_S = 60.0
_DOWNLOAD_LIMIT_S = 3600.0


async def localize_models(
    names: Sequence[str], nodes: Sequence[str], download_limit_s: float = _DOWNLOAD_LIMIT_S
) -> Mapping[str, Path]:
    """Return the directory of each checkpoint, the same on every node; downloads ids of the Hugging Face hub.

    Args:
        names: Absolute directories, or ids such as `org/model`.
        nodes: Ids of the Ray nodes that need them.
        download_limit_s: How long a download may take.

    Raises:
        ConfigError: A node does not have a directory, cannot download it, or has it elsewhere; names node and path.
    """
    limit_s = _CHECK_LIMIT_S if all(Path(name).is_absolute() for name in names) else download_limit_s
    asked = list(dict.fromkeys(nodes))
    answers = await asyncio.gather(*(_ask(node, tuple(names), limit_s) for node in asked))
    problems = [f"node {node[:8]}: {text}" for node, answer in zip(asked, answers, strict=True) for text in answer[1]]
    if problems:
        raise ConfigError("model: not on every node of the group:\n" + "\n".join(problems))
    first = answers[0][0]
    for node, (paths, _) in zip(asked, answers, strict=True):
        for name, path in paths.items():
            if path != first[name]:
                raise ConfigError(
                    f"model: {name!r} is {path} on node {node[:8]}, but {first[name]} on another; TensorRT-LLM's ranks "
                    "need it at one path: set HF_HOME to the same directory on every node"
                )
    return {name: Path(path) for name, path in first.items()}


async def _ask(node: str, names: tuple[str, ...], limit_s: float) -> tuple[dict[str, str], list[str]]:
    pinned = NodeAffinitySchedulingStrategy(node, soft=False)
    task = _resolve_there.options(scheduling_strategy=pinned).remote(names)
    try:
        async with asyncio.timeout(limit_s):
            answer: tuple[dict[str, str], list[str]] = await task
    except TimeoutError:
        ray.cancel(task, force=True)
        return {}, [f"did not answer within {limit_s:.0f} s"]
    except ray.exceptions.RayError as exc:
        return {}, [f"cannot be asked: {exc}"]
    return answer


@ray.remote(num_cpus=0, num_gpus=0, max_retries=0)  # type: ignore[untyped-decorator]
def _resolve_there(names: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    return resolve(names)


def resolve(names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the directories of checkpoints on this node, and what is wrong with the others."""
    paths, problems = {}, []
    for name in names:
        try:
            paths[name] = _directory(name)
        except (OSError, ValueError, ImportError) as exc:
            problems.append(f"{name}: {exc}")
    return paths, problems


def _directory(name: str) -> str:
    path = Path(name).expanduser()
    if path.is_absolute():
        if not path.is_dir():
            raise FileNotFoundError(
                "there is no such directory; copy the checkpoint there, to the same path on every node"
            )
        return str(path)
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise ImportError("ids of the hub need huggingface_hub; install it, or give a local directory") from None
    try:
        return str(hub.snapshot_download(name))
    except Exception as exc:  # of the hub's client: no network, no such repository, no access
        raise OSError(f"cannot be downloaded ({type(exc).__name__}: {exc}); give a local directory") from exc
