"""Names of per-request metrics."""

from trtllm_double.results import MetricNames

__all__ = ["MetricNames"]
