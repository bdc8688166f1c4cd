"""SimOptions: what surrounds the engines in a simulation."""

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from serve.core.routing.fairness import FairnessSettings
from serve.core.strict_model import StrictModel


class SimOptions(StrictModel):
    """Gateways, network and clients of a simulated fleet."""

    gateways: PositiveInt = Field(default=1, description="Gateway processes, among which the arrivals are drawn.")
    delay_s: NonNegativeFloat = Field(default=0.5e-3, description="Of every message between gateway and replica.")
    kv_interval_s: PositiveFloat = Field(
        default=0.01, description="A replica tells what changed in its cache not more often than once in this time."
    )
    load_interval_s: PositiveFloat = Field(
        default=0.025, description="The same of its load, when requests come, begin or go."
    )
    progress_interval_s: PositiveFloat = Field(default=0.1, description="The same, when it does nothing but decode.")
    fairness: FairnessSettings = Field(
        default=FairnessSettings(), description="How requests wait in the gateways while no replica has room."
    )
    look_interval_s: PositiveFloat = Field(
        default=0.025,
        description="How often a gateway looks for room while requests wait. Production does it each 10 ms.",
    )
    max_tokens: PositiveInt | None = Field(
        default=None,
        description="Output limit that clients name if the trace has none. None: the trace's longest output.",
    )
    max_attempts: PositiveInt = Field(default=8, description="Replicas that are asked before a request is refused.")
    max_index_blocks: PositiveInt = Field(default=4_000_000, description="Cap of each gateway's prefix index.")
    seed: NonNegativeInt = Field(default=0, description="Of what is drawn at random.")
