"""Argument models; their names, types and defaults are data."""

from trtllm_double.configs import TorchLlmArgs, by_name
from trtllm_double.signatures import CapacitySchedulerPolicy, ContextChunkingPolicy, LoadFormat, WaitingQueuePolicy

LlmArgs = TorchLlmArgs
globals().update(by_name)

__all__ = [
    "CapacitySchedulerPolicy",
    "ContextChunkingPolicy",
    "LlmArgs",
    "LoadFormat",
    "TorchLlmArgs",
    "WaitingQueuePolicy",
]
