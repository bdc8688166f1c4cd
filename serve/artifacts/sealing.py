"""Records of a store as files: JSON for people, with a checksum, so that a changed byte in one is noticed.

It shows damage and hasty edits, not malice: who may write to the store may also write a new checksum.
"""

import json
from collections.abc import Mapping
from typing import Any

from blake3 import blake3

from serve.artifacts.fingerprint import canonical_json
from serve.artifacts.json_object import write_json

_CHECKSUM = "checksum"


def seal(document: Mapping[str, Any]) -> bytes:
    """Write a document; its `checksum` is the BLAKE3 of the canonical JSON of all the rest."""
    return write_json({**document, _CHECKSUM: _checksum(document)})


def unseal(data: bytes) -> dict[str, Any]:
    """Read a document.

    Raises:
        ValueError: It is no JSON object, or not what was written; says which.
    """
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    given = value.pop(_CHECKSUM, None)
    if given is None:
        raise ValueError("it has no checksum: another version of raytrt wrote it, or it was damaged")
    try:
        found = _checksum(value)
    except TypeError as exc:
        raise ValueError(str(exc)) from None
    if given != found:
        raise ValueError(
            f"its checksum is {given}, and that of its content {found}: it was changed after it was written"
        )
    return value


def _checksum(document: Mapping[str, Any]) -> str:
    return f"blake3:{blake3(canonical_json(document)).hexdigest()}"
