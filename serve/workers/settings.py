"""ReplicaSettings and ScalingSettings: how one model's replicas are placed, limited, watched and scaled by Serve."""

from typing import Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from serve.core.strict_model import StrictModel


class RankResources(StrictModel):
    """What each rank of an engine reserves of its Ray node. An engine without `parallel` is one rank."""

    num_cpus: NonNegativeFloat = Field(default=1.0, description="CPU cores; a share of one is allowed.")
    num_gpus: NonNegativeFloat | None = Field(
        default=None,
        description="GPUs: one, or for an engine without `parallel` a share of one. None: one for the trtllm engine, "
        "none for the others.",
    )
    memory_bytes: NonNegativeInt | None = Field(default=None, description="Main memory; None reserves none.")
    accelerator_type: str | None = Field(default=None, description="GPU model as Ray names it: H100, A100-80G, L4.")
    custom: dict[str, float] = Field(default={}, description="Custom Ray resources.")

    replica_cpus: NonNegativeFloat = Field(
        default=0.5, description="CPU cores of the replica's own process, where the ranks have processes of their own."
    )

    def of_rank(self, default_gpus: float) -> dict[str, float]:
        """Return what one rank takes, as Ray names resources."""
        gpus = default_gpus if self.num_gpus is None else self.num_gpus
        named = {"CPU": self.num_cpus, "GPU": gpus, "memory": float(self.memory_bytes or 0), **self.custom}
        if self.accelerator_type is not None:
            named[f"accelerator_type:{self.accelerator_type}"] = 0.001  # a label: Ray gives each node one of it
        return {name: amount for name, amount in named.items() if amount or name == "CPU"}

    def of_replica(self) -> dict[str, float]:
        """Return what the replica's process takes besides its ranks."""
        return {"CPU": self.replica_cpus}


class ScalingSettings(StrictModel):
    """Bounds and target of the number of replicas; they reach Serve's own request-count policy."""

    min_replicas: NonNegativeInt = Field(default=1, description="0 lets an idle model give back all it holds.")
    max_replicas: PositiveInt = Field(default=1, description="No more than this, whatever the load.")
    initial_replicas: NonNegativeInt | None = Field(default=None, description="At the start; None: min_replicas.")
    target_ongoing_requests: PositiveFloat = Field(
        default=32.0, description="Sequences in flight that one replica should have, running and waiting."
    )
    upscale_delay_s: NonNegativeFloat = Field(default=10.0, description="How long the load has to be higher first.")
    downscale_delay_s: NonNegativeFloat = Field(default=300.0, description="How long it has to be lower first.")
    metrics_interval_s: PositiveFloat = Field(default=2.0, description="How often load is reported.")
    look_back_period_s: PositiveFloat = Field(default=10.0, description="Load is averaged over this time.")

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas={self.min_replicas} exceeds max_replicas={self.max_replicas}; raise max_replicas"
            )
        if self.initial_replicas is not None and not self.min_replicas <= self.initial_replicas <= self.max_replicas:
            raise ValueError(
                f"initial_replicas={self.initial_replicas} is outside "
                f"min_replicas={self.min_replicas} … max_replicas={self.max_replicas}"
            )
        return self


class ReplicaSettings(StrictModel):
    """Limits and watch of one model's replicas."""

    max_ongoing_requests: PositiveInt = Field(
        default=512, description="Sequences that one replica takes, running and waiting for KV blocks together."
    )
    max_queued_requests: int = Field(
        default=2048,
        ge=-1,
        description="Sequences that one gateway holds for replicas that are full; more are refused with status 503 "
        "and Retry-After. -1: no limit.",
    )
    surge_percent: int | None = Field(
        default=None,
        ge=0,
        le=100,
        description="In a rolling update, this many percent more replicas than usual, at least one: new ones start "
        "before old ones stop, and the update waits until there is room for them. 0: old ones stop first; requests of "
        "a model that has no other replica wait at the gateway. None: 25 if the cluster has room when the application "
        "is deployed, else 0.",
    )
    health_check_period_s: PositiveFloat = Field(default=2.0, description="A dead engine is noticed within this time.")
    health_check_timeout_s: PositiveFloat = Field(default=10.0, description="A check that takes longer has failed.")
    drain_timeout_s: PositiveFloat = Field(
        default=300.0, description="A replica that stops finishes its streams first, but takes no longer than this."
    )
