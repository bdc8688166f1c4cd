"""Home of DisaggregatedParams."""

from trtllm_double.sampling_params import DisaggregatedParams

__all__ = ["DisaggregatedParams"]
