"""JSON objects as they are kept in a store."""

import json
from collections.abc import Mapping
from typing import Any


def write_json(value: Mapping[str, Any]) -> bytes:
    """Write an object, readable for people."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def number(value: Any, default: float) -> float:
    """Return a number of an object as it should be; what is none, in a damaged file, is the default."""
    return float(value) if isinstance(value, int | float) else default


def read_json(data: bytes | None) -> dict[str, Any] | None:
    """Read an object; None: there is none, or it is something else."""
    if data is None:
        return None
    try:
        value = json.loads(data)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
