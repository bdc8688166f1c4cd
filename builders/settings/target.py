"""TargetSettings: the nodes on which the bundle is built, and will be served."""

from pydantic import ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from serve.core.strict_model import StrictModel
from serve.workers.engine_env import EngineEnv


class TargetSettings(StrictModel):
    """Which nodes. Without `accelerator`, any node will do, and no GPU is reserved."""

    model_config = ConfigDict(allow_inf_nan=False)

    accelerator: str | None = Field(
        default=None, description="GPU model as Ray names it: H100, H200, A100-80G, L4. Tasks go to nodes that have it."
    )
    engine_env: EngineEnv | None = Field(
        default=None, description="The Python environment of TensorRT-LLM, as in a deployment's config."
    )
    num_cpus: NonNegativeFloat = Field(default=1.0, description="CPU cores that each step reserves.")
    memory_bytes: PositiveInt | None = Field(default=None, description="Main memory that each step reserves.")
    time_limit_s: PositiveFloat = Field(default=4 * 3600.0, description="A step that takes longer is ended.")
    max_retries: int = Field(default=2, ge=0, description="How often a step is tried again after an accident.")
