"""Home of RequestError."""

from trtllm_double.errors import RequestError

__all__ = ["RequestError"]
