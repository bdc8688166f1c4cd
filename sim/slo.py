"""Slo: when a request was served well."""

from pydantic import Field, PositiveFloat

from serve.core.strict_model import StrictModel


class Slo(StrictModel):
    """Limits that a request has to meet, both."""

    ttft_ms: PositiveFloat = Field(default=2000.0, description="Time to the first token.")
    tpot_ms: PositiveFloat = Field(default=50.0, description="Mean time of each further token.")
