"""Executors."""

from trtllm_double.errors import EngineDeadError, RequestError

__all__ = ["EngineDeadError", "RequestError"]
