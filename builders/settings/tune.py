"""TuneSettings: the load that runtime settings are tuned for, and how long."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from serve.core.strict_model import StrictModel


class TuneSettings(StrictModel):
    """A bounded search, by measured load on the real engine."""

    search: Literal["off", "quick", "full"] = Field(
        default="quick", description="off: only the load test of the certificate, with the settings as they are."
    )
    prompt_tokens: PositiveInt = Field(default=512, description="Mean length of the load's prompts.")
    output_tokens: PositiveInt = Field(default=128, description="Of its outputs.")
    ttft_ms: PositiveFloat = Field(default=2000.0, description="Limit of the time to the first token.")
    tpot_ms: PositiveFloat = Field(default=50.0, description="Limit of the time of each further token.")
    percentile: PositiveFloat = Field(default=95.0, lt=100, description="Of the requests that have to meet both.")
    max_trials: PositiveInt = Field(default=12, description="Settings that are tried, the baseline among them.")
    max_s: PositiveFloat = Field(default=1800.0, description="No trial is begun after this time.")
    trial_s: PositiveFloat = Field(default=20.0, description="How long each load is offered.")
    seed: NonNegativeInt = 0
