"""Executors."""

from trtllm_double.errors import RequestError

__all__ = ["RequestError"]
