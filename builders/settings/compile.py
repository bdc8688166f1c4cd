"""CompileSettings: what the compile step fixes in an engine, or prepares for the PyTorch backend."""

from pydantic import Field, PositiveInt

from serve.core.strict_model import StrictModel


class CompileSettings(StrictModel):
    """Sizes of a TensorRT engine, or upper bounds of the PyTorch backend's; None: planned from model and GPU."""

    max_batch_size: PositiveInt | None = Field(default=None, description="Sequences that are computed together.")
    max_num_tokens: PositiveInt | None = Field(default=None, description="Tokens of one step.")
    max_input_tokens: PositiveInt | None = Field(default=None, description="Longest prompt.")
    context_tokens: PositiveInt | None = Field(default=None, description="Prompt and output together.")
    multiple_profiles: bool = Field(
        default=True,
        description="TensorRT engine: kernels for several ranges of batch size, not one; longer build, faster engine.",
    )
    timing_cache: str | None = Field(
        default=None,
        description="Directory on the build's node that keeps TensorRT's timings between builds, a file for each GPU "
        "model and release; builds of like models take half the time. None: not kept.",
    )
    warm_start: bool = Field(
        default=True,
        description="PyTorch backend: start the engine once, and keep what it compiled and tuned in the bundle, so "
        "that replicas start sooner.",
    )
