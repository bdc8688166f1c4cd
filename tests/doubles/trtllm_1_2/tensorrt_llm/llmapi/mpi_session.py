"""MPI sessions."""

from trtllm_double.spawners import MpiPoolSession

__all__ = ["MpiPoolSession"]
