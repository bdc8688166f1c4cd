"""Fingerprints: what shapes a bundle or a step's output -> canonical JSON -> sha256."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


def canonical_json(value: Any) -> bytes:
    """Write a value so that equal values give equal bytes: sorted keys, no spaces, UTF-8, shortest numbers.

    Args:
        value: Of what JSON knows. A float that is a whole number is written as that number: YAML readers differ there.

    Raises:
        TypeError: It holds something else, a key that is no string, or a number that JSON cannot write.
    """
    return json.dumps(
        _plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def fingerprint(value: Any) -> str:
    """Return the sha256 of the canonical JSON, 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def is_fingerprint(text: str) -> bool:
    """Return whether a text has the form of a fingerprint."""
    return _FINGERPRINT.fullmatch(text) is not None


def _plain(value: Any) -> Any:
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            if value != value or value in (float("inf"), float("-inf")):
                raise TypeError(f"{value!r} cannot be written as JSON")
            return int(value) if value.is_integer() else value
        case list() | tuple():
            return [_plain(item) for item in value]
        case Mapping():
            if not all(isinstance(key, str) for key in value):
                raise TypeError(f"keys have to be strings: {list(value)!r}")
            return {key: _plain(item) for key, item in value.items()}
    raise TypeError(f"{type(value).__name__} cannot be written as JSON: {value!r}")
