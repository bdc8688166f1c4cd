"""Home of SamplingParams."""

from trtllm_double.sampling_params import GuidedDecodingParams, SamplingParams

__all__ = ["GuidedDecodingParams", "SamplingParams"]
