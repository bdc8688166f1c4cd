"""ConstructorCall: a call of one of TensorRT-LLM's classes as a value, so that it can be checked, shown and made."""

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ConstructorCall:
    """A class and its keywords.

    Attributes:
        target: `module:Class`.
        keywords: Plain values, other calls, lists and dictionaries of these; placement groups are passed as they are.
    """

    target: str
    keywords: Mapping[str, Any]

    @property
    def class_name(self) -> str:
        """Name of the class alone."""
        return self.target.partition(":")[2]

    def nested(self) -> Iterator["ConstructorCall"]:
        """Yield this call and every call inside, outermost first."""
        yield self
        yield from _calls_in(self.keywords)


def make(call: ConstructorCall) -> Any:
    """Import the class and make the object, nested ones first. Blocks: for an LLM until the model is loaded."""
    module, _, name = call.target.partition(":")
    constructor = getattr(importlib.import_module(module), name)
    return constructor(**{key: _made(value) for key, value in call.keywords.items()})


def _made(value: Any) -> Any:
    if isinstance(value, ConstructorCall):
        return make(value)
    if isinstance(value, Mapping):
        return {key: _made(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_made(part) for part in value]
    return value


def _calls_in(value: Any) -> Iterator[ConstructorCall]:
    if isinstance(value, ConstructorCall):
        yield from value.nested()
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _calls_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _calls_in(part)
