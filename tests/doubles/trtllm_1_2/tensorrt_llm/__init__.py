"""Contract double of TensorRT-LLM 1.2.x: see tests/doubles/README.md. Not the library."""

import sys
from pathlib import Path

_CORE = str(Path(__file__).resolve().parents[2] / "core")
if _CORE not in sys.path:
    sys.path.append(_CORE)

from trtllm_double import line as _line  # noqa: E402  # after the path

_line.choose("1.2.x")

from trtllm_double.async_llm import AsyncLLM  # noqa: E402
from trtllm_double.llm import LLM  # noqa: E402
from trtllm_double.sampling_params import (  # noqa: E402
    DisaggregatedParams,
    GuidedDecodingParams,
    LoRARequest,
    SamplingParams,
)

from tensorrt_llm.version import __version__  # noqa: E402

__all__ = [
    "LLM",
    "AsyncLLM",
    "DisaggregatedParams",
    "GuidedDecodingParams",
    "LoRARequest",
    "SamplingParams",
    "__version__",
]
