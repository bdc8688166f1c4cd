"""Home of LoraConfig."""

from trtllm_double.configs import by_name

LoraConfig = by_name["LoraConfig"]

__all__ = ["LoraConfig"]
