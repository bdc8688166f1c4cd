"""BundleSettings: how a replica takes an engine bundle into use."""

from pydantic import Field, NonNegativeInt, PositiveFloat

from serve.core.strict_model import StrictModel


class BundleSettings(StrictModel):
    """Download and check of a bundle, before and after its engine starts."""

    golden_samples: NonNegativeInt = Field(
        default=4,
        description="Answers of the bundle's certificate that a replica repeats before it takes requests; 0: none.",
    )
    min_golden_agreement: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description="Share of their tokens, on average, that have to be the same; fewer, and the start has failed. "
        "Not 1: kernels round differently in batches of another shape.",
    )
    golden_timeout_s: PositiveFloat = Field(default=300.0, description="Repeating them may take this long.")
    lease_s: PositiveFloat = Field(
        default=3600.0,
        description="Gateways and replicas tell the store that they use a bundle, four times in this time; the store's "
        "garbage collection keeps it so long after they have gone.",
    )
