"""Home of LoRARequest."""

from trtllm_double.sampling_params import LoRARequest

__all__ = ["LoRARequest"]
