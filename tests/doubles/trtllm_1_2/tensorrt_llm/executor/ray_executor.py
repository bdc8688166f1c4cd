"""The Ray executor, which 1.2.x can only import with Ray < 2.55, or with its import mended."""

from trtllm_double.ray_executor import RayExecutor

__all__ = ["RayExecutor"]
