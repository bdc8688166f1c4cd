"""NodeFacts: the hardware and software of a node, as far as a bundle may depend on it."""

from pydantic import Field, PositiveInt

from serve.core.strict_model import StrictModel


class GpuFacts(StrictModel):
    """One GPU."""

    name: str = Field(description="As the driver has it, for instance `NVIDIA H100 80GB HBM3`.")
    compute_capability: str = Field(pattern=r"^\d+\.\d+$", description="For instance 9.0.")
    memory_bytes: PositiveInt = Field(description="All of it, whether free or in use.")


class NodeFacts(StrictModel):
    """One node."""

    gpus: tuple[GpuFacts, ...] = Field(default=(), description="Those that the asking process may use.")
    driver: str | None = Field(default=None, description="Version of NVIDIA's driver; None: there is none.")
    cuda: str | None = Field(default=None, description="Newest CUDA that the driver supports, for instance 13.0.")
    machine: str = Field(description="Processor architecture, for instance x86_64.")
    libraries: dict[str, str] = Field(
        default={}, description="Versions of the installed libraries that load or make models, by distribution name."
    )
