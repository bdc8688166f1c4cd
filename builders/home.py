"""What builds keep on a machine: logs in `~/.raytrt`, or RAYTRT_HOME; files in the cache of bundles."""

import os
from pathlib import Path

from serve.artifacts.cache_place import DATABASE, cache_root

VARIABLE = "RAYTRT_HOME"


def home() -> Path:
    """Return the directory, which need not exist yet."""
    return Path(os.environ.get(VARIABLE) or "~/.raytrt").expanduser().absolute()


def digest_database() -> Path:
    """Where digests of files are remembered."""
    return cache_root() / DATABASE


def log_file(build: str, step: str) -> Path:
    """Where a step of a build writes what it prints."""
    return home() / "logs" / build / f"{step}.log"


def work_directory() -> Path:
    """Where steps that run keep their files; on one file system with the cache, so that links do."""
    return cache_root() / "work"
