"""decode_body: a request's JSON to its struct, or an error that names the field."""

from typing import Any, TypeVar

import msgspec

from serve.ingress.api_error import from_decoding

_T = TypeVar("_T")


def decode_body(decoder: msgspec.json.Decoder[_T], body: bytes) -> _T:
    """Return the request.

    Raises:
        ApiError: The body is no JSON, or not what the endpoint takes.
    """
    try:
        return decoder.decode(body)
    except (ValueError, RecursionError) as exc:  # msgspec's errors, and invalid UTF-8
        if "got `float`" in str(exc):
            return _decode_integral_floats(decoder, body)
        raise from_decoding(exc) from exc


def _decode_integral_floats(decoder: msgspec.json.Decoder[_T], body: bytes) -> _T:
    """Try again with 16.0 read as 16: to JSON they are the same number, and some clients write all numbers so."""
    try:
        request: _T = msgspec.convert(_integral(msgspec.json.decode(body)), decoder.type)
    except (ValueError, RecursionError) as exc:
        raise from_decoding(exc) from exc
    return request


def _integral(value: Any) -> Any:
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, list):
        return [_integral(item) for item in value]
    if isinstance(value, dict):
        return {key: _integral(item) for key, item in value.items()}
    return value
