"""TuneSettings: the load that runtime settings are tuned for, and how long."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt

from serve.core.strict_model import StrictModel


def _off(value: Any) -> Any:
    return "off" if value is False else value  # YAML 1.1 reads an unquoted off so


class TuneSettings(StrictModel):
    """A bounded search, by measured load on the real engine."""

    search: Annotated[Literal["off", "quick", "full"], BeforeValidator(_off)] = Field(
        default="quick", description="off: only the load test of the certificate, with the settings as they are."
    )
    prompt_tokens: PositiveInt = Field(default=512, description="Mean length of the load's prompts.")
    output_tokens: PositiveInt = Field(default=128, description="Of its outputs.")
    ttft_ms: PositiveFloat = Field(default=2000.0, description="Limit of the time to the first token.")
    tpot_ms: PositiveFloat = Field(default=50.0, description="Limit of the time of each further token.")
    percentile: PositiveFloat = Field(default=95.0, lt=100, description="Of the requests that have to meet both.")
    max_trials: PositiveInt = Field(default=12, description="Settings that are tried, the baseline among them.")
    max_s: PositiveFloat = Field(
        default=1800.0,
        description="When no more trial is begun, and one that runs is ended; the baseline has all it needs.",
    )
    trial_s: PositiveFloat = Field(default=20.0, description="How long each load is offered.")
    seed: NonNegativeInt = 0
