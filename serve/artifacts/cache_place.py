"""Where bundles are cached on a node, and how much of its disk they may take."""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from serve.errors import ConfigError

PLACE_VARIABLE = "RAYTRT_BUNDLE_CACHE"
LIMIT_VARIABLE = "RAYTRT_BUNDLE_CACHE_LIMIT"
# Digests of files that were checked; see `digests`.
DATABASE = "digests.sqlite"
_DEFAULT_LIMIT = "50%"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?", re.IGNORECASE)


def cache_root(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the directory of the cache."""
    return Path(environment.get(PLACE_VARIABLE) or "~/.cache/raytrt/bundles").expanduser().absolute()


def cache_limit(root: Path, environment: Mapping[str, str] = os.environ) -> int:
    """Return how many bytes the cache may have.

    Raises:
        ConfigError: The variable is neither a size nor a share of the disk.
    """
    text = environment.get(LIMIT_VARIABLE) or _DEFAULT_LIMIT
    try:
        return parse_limit(text, shutil.disk_usage(root).total)
    except ValueError as exc:
        raise ConfigError(f"{LIMIT_VARIABLE}: {exc}") from None


def parse_limit(text: str, disk_bytes: int) -> int:
    """Read `200GiB`, `200 GB`, `214748364800`, or `40%` of the disk.

    Raises:
        ValueError: It has no such form.
    """
    share = text.strip().removesuffix("%")
    if share != text.strip():
        try:
            percent = float(share)
        except ValueError:
            percent = -1.0
        if 0 < percent <= 100:
            return int(disk_bytes * percent / 100)
    elif match := _SIZE.fullmatch(text.strip()):
        return int(float(match[1]) * _UNITS[match[2].lower()])
    raise ValueError(f"{text!r} is no size; write for instance 200GiB, or 50% of the disk")
