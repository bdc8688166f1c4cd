"""ApiError: what goes wrong, as OpenAI's API says it. Pure."""

import math
import re

import msgspec

from serve.errors import ContextTooLong, EngineDead, Overloaded, RequestError


class ErrorBody(msgspec.Struct, frozen=True):
    """What went wrong.

    Attributes:
        message: For people.
        type: Class of the error.
        param: The field of the request, if it was one.
        code: Short reason, if there is one.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(msgspec.Struct, frozen=True):
    """Body of every answer that is no success."""

    error: ErrorBody


_TYPES = {408: "timeout_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is no success.

    Args:
        status: HTTP status.
        message: For the client; says what to do about it.
        param: Path of the offending field, such as `messages[0].content`.
        code: Short machine-readable reason.
        retry_after_s: When trying again is worthwhile.
        headers: Further response headers, lower case.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        self.extra_headers = headers

    def __str__(self) -> str:
        return self.message

    def body(self) -> bytes:
        """Return the JSON of the answer, or of the last event of a stream."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return msgspec.json.encode(ErrorResponse(ErrorBody(self.message, kind, self.param, self.code)))

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that belong to it."""
        headers = list(self.extra_headers)
        if self.retry_after_s is not None:
            # Whole seconds are the standard; the openai client reads milliseconds too.
            headers.append((b"retry-after", b"%d" % max(1, math.ceil(self.retry_after_s))))
            headers.append((b"retry-after-ms", b"%d" % math.ceil(self.retry_after_s * 1000)))
        return headers


def from_exception(exc: Exception, retry_after_s: float) -> ApiError | None:
    """Return the answer to an exception; None if it is nobody's fault but ours.

    Args:
        exc: What was raised.
        retry_after_s: For what says nothing about it itself.
    """
    match exc:
        case ApiError():
            return exc
        case ContextTooLong() | RequestError():
            return ApiError(400, exc.message, param=exc.param, code=exc.code)
        case Overloaded():
            return ApiError(503, exc.message, code="overloaded", retry_after_s=exc.retry_after_s)
        case EngineDead():
            message = "The replica that worked on this request was lost. Send it again."
            return ApiError(503, message, code="engine_dead", retry_after_s=retry_after_s)
    return None


def internal_error(request_id: str) -> ApiError:
    """Return the answer to a defect of ours; details are in the log only."""
    return ApiError(500, f"Internal error. Name the request id {request_id} when you report it.", code="internal_error")


def model_not_found(model: str) -> ApiError:
    """Return the answer to a request for a model that is not served."""
    return ApiError(
        404,
        f"The model '{printable(model)}' does not exist. GET /v1/models lists those that do.",
        param="model",
        code="model_not_found",
    )


def printable(text: str, limit: int = 128) -> str:
    """Return a client's text in a form that is safe to show and to log."""
    cut = text if len(text) <= limit else text[:limit] + "…"
    return "".join(char if char.isprintable() else "�" for char in cut)


_AT = re.compile(r" - at `(?P<path>\$.*)`$", re.DOTALL)
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<name>.*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<name>.*)`$", re.DOTALL)
_MEDIA = re.compile(r"\.content\[\d+\]\.type$")


def from_decoding(exc: Exception) -> ApiError:
    """Return the answer to a body that msgspec could not decode, with the path of the field.

    Source of the forms: msgspec 0.19 to 0.22, `_core.c`.
    """
    if not isinstance(exc, msgspec.ValidationError):
        reason = "it is nested too deeply" if isinstance(exc, RecursionError) else str(exc)
        return ApiError(400, f"The body is not valid JSON: {printable(reason)}.", code="invalid_json")
    text, path = str(exc), ""
    if at := _AT.search(text):
        text, path = text[: at.start()], at["path"].removeprefix("$").removeprefix(".")
    if unknown := _UNKNOWN.match(text):
        param = _join(path, printable(unknown["name"]))
        return ApiError(400, f"Unknown field '{param}'. Leave it out.", param=param, code="unknown_parameter")
    if missing := _MISSING.match(text):
        param = _join(path, missing["name"])
        return ApiError(400, f"The field '{param}' is required.", param=param, code="missing_required_parameter")
    if _MEDIA.search(path):
        text = f"{text}. Only text is supported: send parts of type 'text'"
    where = f"'{path}': " if path else ""
    return ApiError(400, printable(f"{where}{text}.", 512), param=path or None, code="invalid_value")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
