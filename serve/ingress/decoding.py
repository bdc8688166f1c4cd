"""decode_body: a request's JSON to its struct, or an error that names the field."""

from typing import TypeVar

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
        raise from_decoding(exc) from exc
