"""Exceptions that cross from the library to its user (reference 2.1, 2.5)."""


class RequestError(RuntimeError):
    """One request failed; the LLM stays usable."""


class EngineDeadError(RuntimeError):
    """The engine is lost (newest line only; not a RequestError)."""


RequestError.__module__ = "tensorrt_llm.executor.utils"  # their names in messages and tracebacks
EngineDeadError.__module__ = "tensorrt_llm.executor"
