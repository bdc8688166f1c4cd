"""Version of TensorRT-LLM that this double imitates."""

__version__ = "1.2.1"
