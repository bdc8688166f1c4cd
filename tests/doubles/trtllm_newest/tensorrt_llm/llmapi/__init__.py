"""Public names of the LLM API."""

from trtllm_double.configs import TorchLlmArgs, by_name
from trtllm_double.errors import RequestError
from trtllm_double.llm import LLM
from trtllm_double.results import CompletionOutput, RequestOutput
from trtllm_double.sampling_params import DisaggregatedParams, GuidedDecodingParams, LoRARequest, SamplingParams
from trtllm_double.signatures import CapacitySchedulerPolicy, ContextChunkingPolicy

globals().update(by_name)

__all__ = [
    "LLM",
    "CapacitySchedulerPolicy",
    "CompletionOutput",
    "ContextChunkingPolicy",
    "DisaggregatedParams",
    "GuidedDecodingParams",
    "LoRARequest",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "TorchLlmArgs",
]
