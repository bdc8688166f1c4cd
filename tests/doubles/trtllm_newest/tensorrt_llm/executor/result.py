"""Home of the result classes."""

from trtllm_double.results import CompletionOutput, Logprob

__all__ = ["CompletionOutput", "Logprob"]
