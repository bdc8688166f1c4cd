"""The Ray executor."""

from trtllm_double.ray_executor import RayExecutor

__all__ = ["RayExecutor"]
