"""ParallelLayout: how one engine is cut into ranks."""

from typing import Self

from pydantic import Field, PositiveInt, model_validator

from serve.core.strict_model import StrictModel


class ParallelLayout(StrictModel):
    """How one engine is cut into ranks. Rank r is tensor shard r % tensor of pipeline stage r // tensor."""

    tensor: PositiveInt = Field(default=1, description="GPUs that share each layer; they talk in every layer.")
    pipeline: PositiveInt = Field(default=1, description="Groups of layers, each on `tensor` GPUs of its own.")
    expert: PositiveInt | None = Field(
        default=None,
        description="Of the `tensor` GPUs, over how many whole experts of a mixture-of-experts model are spread; "
        "a divisor of `tensor`. None: every expert is cut into `tensor` parts.",
    )
    gpus_per_node: PositiveInt | None = Field(
        default=None, description="GPUs that the engine takes of each node; None: all ranks on one node."
    )
    tensor_across_nodes: bool = Field(
        default=False, description="Let the GPUs of one pipeline stage be on several nodes: slow without NVLink there."
    )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor * self.pipeline

    @model_validator(mode="after")
    def _experts_divide_tensor(self) -> Self:
        if self.expert is not None and self.tensor % self.expert:
            raise ValueError(f"expert={self.expert} does not divide tensor={self.tensor}; use a divisor of it")
        return self

    @model_validator(mode="after")
    def _stages_fit_nodes(self) -> Self:
        if self.gpus_per_node is not None and self.tensor > self.gpus_per_node and not self.tensor_across_nodes:
            raise ValueError(
                f"tensor={self.tensor} exceeds gpus_per_node={self.gpus_per_node}, so that every layer would talk "
                "across nodes; use pipeline parallelism across nodes, or set tensor_across_nodes: true"
            )
        return self
