"""FairnessSettings: how tenants share a fleet that has not room for all."""

from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from serve.core.fair_queue import FairLimits
from serve.core.routing.saturation import RoomLimits
from serve.core.strict_model import StrictModel

Weight = Annotated[float, Field(gt=0.0, le=1e6)]


class FairnessSettings(StrictModel):
    """While every replica is full, requests wait in the gateway, and tenants take turns by what they let compute.

    Only if there is something to share: without weights, while all requests of the last ten minutes have had one tenant
    and one priority, they are sent at once.
    """

    enabled: bool = Field(
        default=True, description="False: requests are sent at once, and wait at the replicas in the order they came."
    )
    weights: dict[str, Weight] = Field(default={}, description="Shares of tenants, relative to each other.")
    default_weight: Weight = Field(default=1.0, description="Share of every other tenant.")
    max_queued: PositiveInt = Field(
        default=1024,
        description="Requests that wait in one gateway. Beyond, the newest of the tenant with the most gets 503.",
    )
    max_wait_s: PositiveFloat = Field(
        default=30.0, description="A request that waits longer gets status 503, and Retry-After."
    )
    aging_s: PositiveFloat = Field(default=5.0, description="After each such time, a request moves up a priority.")
    priorities: Annotated[int, Field(ge=0, le=100)] = Field(
        default=3,
        description="Classes below and above priority 0 that clients may ask for (lower is served first); what is "
        "beyond counts as the outermost. 0: priorities of clients change nothing.",
    )
    max_tenants: PositiveInt = Field(default=1024, description="Tenants with an account of their own at one time.")
    output_weight: NonNegativeFloat = Field(
        default=1.0, description="What an output token costs a tenant, in prompt tokens that had to be computed."
    )
    expected_output_tokens: NonNegativeInt = Field(
        default=256,
        description="Output a request is charged with at first, if it may have so much; corrected at its end.",
    )
    full_wait_s: PositiveFloat = Field(
        default=1.0, description="A replica is full if the prompts there keep it busy for longer;"
    )
    full_waiting: PositiveInt = Field(
        default=32, description="or if so many requests there are not in the batch yet. Lower is fairer, not faster;"
    )
    full_kv_share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.97, description="or if running requests use more of the KV blocks."
    )

    @property
    def limits(self) -> FairLimits:
        """Settings of the queue."""
        return FairLimits(
            weights=self.weights,
            default_weight=self.default_weight,
            max_queued=self.max_queued,
            aging_s=self.aging_s,
            highest_class=-self.priorities,
            lowest_class=self.priorities,
            max_tenants=self.max_tenants,
        )

    @property
    def room(self) -> RoomLimits:
        """When a replica is full."""
        return RoomLimits(self.full_wait_s, self.full_waiting, self.full_kv_share)
