"""Workers of the Ray executor."""

from trtllm_double.ray_worker import RayWorkerWrapper

__all__ = ["RayWorkerWrapper"]
