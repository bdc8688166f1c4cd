"""Exceptions that cross from the library to its user (reference 2.1, 2.5)."""


class RequestError(RuntimeError):
    """One request failed; the LLM stays usable."""


class EngineDeadError(RuntimeError):
    """The engine is lost (newest line only; not a RequestError)."""
