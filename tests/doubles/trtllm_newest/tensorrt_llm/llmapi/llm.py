"""Home of the LLM classes."""

from trtllm_double.llm import LLM, BaseLLM
from trtllm_double.results import RequestOutput

__all__ = ["LLM", "BaseLLM", "RequestOutput"]
