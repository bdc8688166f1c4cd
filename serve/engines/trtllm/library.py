"""Library: the classes of the installed TensorRT-LLM that requests need. Imports it, and torch, late."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from serve.engines.trtllm.line import PACKAGE


@dataclass(frozen=True)
class Library:
    """What is there once TensorRT-LLM has been imported.

    Attributes:
        sampling_params: Its class of that name.
        sampling_fields: The keywords that this takes.
        request_error: Raised for one request's failure.
        blake3: With which 1.2.x hashes cache salts; None if it is not installed.
    """

    sampling_params: Callable[..., Any]
    sampling_fields: frozenset[str]
    request_error: type[Exception]
    blake3: Callable[[bytes], bytes] | None


def load_library() -> Library:
    """Import what is needed; the engine has been constructed, so this is quick."""
    package = importlib.import_module(PACKAGE)
    request_error = importlib.import_module(f"{PACKAGE}.llmapi").RequestError
    fields = frozenset(field.name for field in dataclasses.fields(package.SamplingParams))
    return Library(package.SamplingParams, fields, request_error, _blake3())


def make_sampling_params(library: Library, keywords: Mapping[str, Any], vocab_size: int) -> Any:
    """Make a `SamplingParams`, of which each request needs one of its own: the library changes it."""
    bias = keywords.get("embedding_bias")
    if bias is None:
        return library.sampling_params(**keywords)
    torch = importlib.import_module("torch")
    tensor = torch.zeros(vocab_size, dtype=torch.float32)
    tensor[list(bias)] = torch.tensor(list(bias.values()), dtype=torch.float32)
    return library.sampling_params(**{**keywords, "embedding_bias": tensor})


def _blake3() -> Callable[[bytes], bytes] | None:
    try:
        blake3 = importlib.import_module("blake3").blake3
    except ImportError:
        return None
    return lambda data: bytes(blake3(data).digest())
