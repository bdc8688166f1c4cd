"""Home of AsyncLLM."""

from trtllm_double.async_llm import AsyncLLM

__all__ = ["AsyncLLM"]
