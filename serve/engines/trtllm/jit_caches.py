"""What TensorRT-LLM's PyTorch backend compiles and tunes at its start, kept in a bundle's `caches/` for the next start.

A cache holds for the GPU model and the release that it was made with. The library does not check that of its
autotuner's, and a bundle for this backend may be loaded by others: so both are written beside the caches, and compared.
Caches are copied to a directory of this process: the library writes into them, and a bundle's files are shared and
read-only.

Sources: `TLLM_AUTOTUNER_CACHE_PATH` in the PyTorch backend's model engine (1.2 and main); `TRTLLM_DG_CACHE_DIR` in the
compiler of its FP8 products; the caches of Triton and Inductor are PyTorch's. FlashInfer's is not kept: ranks that
share one overwrite each other's loaded libraries (TensorRT-LLM, "Troubleshooting").
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from serve.artifacts.node_facts import NodeFacts
from serve.engines.trtllm.settings import TrtllmSettings

logger = logging.getLogger(__name__)

FOLDER = "jit"  # in `caches/`
_MADE_WITH = "made_with.json"
# Variable -> place below the cache's directory; the first is a file, which the library writes.
_VARIABLES: Mapping[str, str] = {
    "TLLM_AUTOTUNER_CACHE_PATH": "autotuner/tactics.json",
    "TRTLLM_DG_CACHE_DIR": "deep_gemm",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
}


@dataclass(frozen=True)
class CacheOrigin:
    """What caches hold for.

    Attributes:
        version: Of TensorRT-LLM.
        gpus: Names of the GPU models, as the driver has them.
    """

    version: str
    gpus: tuple[str, ...]

    def __str__(self) -> str:
        return f"TensorRT-LLM {self.version} on {', '.join(self.gpus) or 'no GPU'}"


def origin_of(version: str, node: NodeFacts) -> CacheOrigin:
    """Return what caches that are made on a node hold for."""
    return CacheOrigin(version, tuple(sorted({gpu.name for gpu in node.gpus})))


def cache_environ(directory: Path) -> dict[str, str]:
    """Return the variables that put all caches below a directory, and make the directories."""
    for place in _VARIABLES.values():
        folder = directory / place
        (folder.parent if folder.suffix else folder).mkdir(parents=True, exist_ok=True)
    return {name: str(directory / place) for name, place in _VARIABLES.items()}


def collect_caches(directory: Path, target: Path, origin: CacheOrigin) -> dict[str, int]:
    """Copy what a start has left in its caches; what compilers left unfinished stays behind.

    Args:
        directory: Where `cache_environ` put them.
        target: Where they are kept; not made if there are none.
        origin: What they hold for.

    Returns:
        Bytes of each cache that has any.
    """
    sizes: dict[str, int] = {}
    for place in _VARIABLES.values():
        name = place.partition("/")[0]
        files = [path for path in sorted((directory / name).rglob("*")) if path.is_file() and not _is_unfinished(path)]
        for path in files:
            copied = target / path.relative_to(directory)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied)
        if size := sum(path.stat().st_size for path in files):
            sizes[name] = size
    if sizes:
        (target / _MADE_WITH).write_text(json.dumps(asdict(origin)) + "\n")
    return sizes


def with_caches(
    settings: TrtllmSettings, model_dir: Path, find_origin: Callable[[], CacheOrigin], make_scratch: Callable[[], Path]
) -> TrtllmSettings:
    """Return settings under which the engine uses the caches of its bundle, if it has any that hold here.

    Args:
        settings: Of the engine; what the operator set in `environment` counts.
        model_dir: `model/` of a bundle, or any other checkpoint.
        find_origin: Tells what would hold here.
        make_scratch: Names a directory for this process, which is not there yet.
    """
    kept = model_dir.parent / "caches" / FOLDER
    if not (kept / _MADE_WITH).is_file():
        return settings
    told = json.loads((kept / _MADE_WITH).read_bytes())
    made, here = CacheOrigin(str(told["version"]), tuple(told["gpus"])), find_origin()
    if made != here:
        logger.info("The bundle's caches were made by %s; here is %s: the start takes as long as without.", made, here)
        return settings
    scratch = make_scratch()
    shutil.copytree(kept, scratch, copy_function=shutil.copyfile)
    logger.info(
        "Starting with the bundle's caches: %s", ", ".join(sorted(p.name for p in kept.iterdir() if p.is_dir()))
    )
    return settings.model_copy(update={"environment": {**cache_environ(scratch), **settings.environment}})


def _is_unfinished(path: Path) -> bool:
    return path.suffix in (".lock", ".tmp") or any(part.startswith("tmp") for part in path.parts[-3:])
