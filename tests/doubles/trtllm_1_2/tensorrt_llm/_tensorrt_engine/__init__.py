"""The TensorRT backend."""

from trtllm_double.tensorrt_llm_class import LLM

__all__ = ["LLM"]
