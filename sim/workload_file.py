"""read_workload: a file of any kind that the simulator reads."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from serve.yaml_file import read_settings
from sim.text_file import TraceError, numbered_lines
from sim.workload import Workload
from sim.workload_azure import read_azure
from sim.workload_mooncake import BLOCK_TOKENS, read_mooncake
from sim.workload_request_log import read_request_log
from sim.workload_synthetic import SyntheticWorkload, synthesise

Format = Literal["mooncake", "azure", "log", "synthetic"]
FORMATS: tuple[Format, ...] = ("mooncake", "azure", "log", "synthetic")


def read_workload(
    paths: Path | Sequence[Path],
    kind: Format | None = None,
    *,
    tokens_per_block: int | None = None,
    default_block: int = 32,
    limit: int | None = None,
    model: str | None = None,
) -> Workload:
    """Read a workload.

    Args:
        paths: A trace, a request log, which may be several files, or the description of a synthetic workload.
        kind: Of the file; None: as it looks like.
        tokens_per_block: Of its hashes; None: the file's own size, or `default_block` where it has none.
        default_block: Size of blocks for files without any.
        limit: Requests to read at most.
        model: Whose requests of a request log.

    Raises:
        ConfigError: It cannot be read; names file, line and remedy.
    """
    files = [paths] if isinstance(paths, Path) else list(paths)
    path = files[0]
    kind = kind or _guess(path)
    if len(files) > 1 and kind != "log":
        raise TraceError(f"{files[1]}: only a request log may be several files, and {path} is none; give one file")
    readers: dict[Format, Callable[[], Workload]] = {
        "mooncake": lambda: read_mooncake(path, tokens_per_block or BLOCK_TOKENS, limit=limit),
        "azure": lambda: read_azure(path, tokens_per_block or default_block, limit=limit),
        "log": lambda: read_request_log(files, tokens_per_block, model=model, limit=limit),
        "synthetic": lambda: synthesise(
            read_settings(SyntheticWorkload, path), tokens_per_block or default_block, limit=limit
        ),
    }
    return readers[kind]()


def _guess(path: Path) -> Format:
    if path.suffix in (".yaml", ".yml"):
        return "synthetic"
    _, line = next(numbered_lines(path, 1), (1, b""))
    if line.startswith(b"TIMESTAMP"):
        return "azure"
    try:
        keys = json.loads(line)
    except ValueError:
        keys = {}
    if isinstance(keys, dict) and "hash_ids" in keys:
        return "mooncake"
    if isinstance(keys, dict) and "route_id" in keys:
        return "log"
    raise TraceError(
        f"{path}:1: this is no trace of Mooncake (JSON with hash_ids), Azure (CSV with TIMESTAMP) or a request log "
        f"(JSON with route_id), and no .yaml; say what it is by --format, one of {', '.join(FORMATS)}"
    )
