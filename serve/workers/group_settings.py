"""GroupSettings: how the ranks of one engine are watched, and how they end."""

from typing import Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator

from serve.core.heartbeat import Heartbeats
from serve.core.strict_model import StrictModel
from serve.core.watchdog import TokenLimits

DEFAULT_START_LIMIT_S = 1800.0


class GroupSettings(StrictModel):
    """Watch over the ranks of one engine."""

    start_limit_s: PositiveFloat | None = Field(
        default=None,
        description="An engine that cannot generate after this time has failed to start. By default a minute more than "
        "the engine's `start_timeout_s`, which tells more; 1800 where it has none.",
    )
    heartbeat_s: PositiveFloat = Field(default=0.5, description="Time between two signs of life of a rank.")
    heartbeat_limit_s: PositiveFloat = Field(
        default=2.0, description="A rank that is silent for longer is lost; half of it, and the group is degraded."
    )
    token_limit_s: PositiveFloat = Field(
        default=10.0,
        description="An engine that has requests and generates nothing for longer has stalled. Long prompts, at the "
        "speed that was measured, move this.",
    )
    first_token_limit_s: PositiveFloat = Field(
        default=120.0, description="The same before the first token: kernels are compiled, graphs captured."
    )
    token_slack: float = Field(
        default=3.0, ge=1.0, description="So many times slower than measured is not yet a stall."
    )
    prefill_tokens_per_s: PositiveFloat = Field(
        default=500.0, description="Speed at which prompts are computed, assumed until one was measured."
    )
    token_limit_max_s: PositiveFloat = Field(
        default=120.0,
        description="No prompt moves `token_limit_s` beyond this. Raise it for prompts that take longer to compute.",
    )
    prefill_batch_tokens: NonNegativeInt = Field(
        default=16_384,
        description="Prompt tokens of other requests that an engine may compute along with the longest prompt before "
        "its next token.",
    )
    end_grace_s: NonNegativeFloat = Field(
        default=10.0, description="How long ranks may take to end by themselves before they are killed."
    )
    kill_limit_s: PositiveFloat = Field(
        default=5.0, description="How long killed ranks are waited for; longer, and they are reported."
    )
    memory_limit_s: NonNegativeFloat = Field(
        default=15.0, description="How long the GPUs' memory is waited for once the ranks are gone."
    )
    memory_tolerance_bytes: NonNegativeInt = Field(
        default=2**30, description="Memory that may be in use beyond what was before the start."
    )
    lease_s: PositiveFloat = Field(
        default=60.0,
        description="A rank that does not hear from its replica for longer ends with all it started, "
        "in case both died, or their nodes lost each other.",
    )

    @model_validator(mode="after")
    def _limits_leave_room_for_beats(self) -> Self:
        if self.heartbeat_limit_s < 2 * self.heartbeat_s:
            raise ValueError(
                f"heartbeat_limit_s={self.heartbeat_limit_s} is less than two of heartbeat_s={self.heartbeat_s}: one "
                "late beat would end the engine; raise heartbeat_limit_s"
            )
        if self.lease_s < 2 * self.heartbeat_limit_s:
            raise ValueError(
                f"lease_s={self.lease_s} is less than twice heartbeat_limit_s={self.heartbeat_limit_s}: a rank would "
                "end before its replica can tell; raise lease_s"
            )
        return self

    @property
    def look_s(self) -> float:
        """Time between two looks at beats and tokens."""
        return self.heartbeat_s / 2

    def heartbeats(self) -> Heartbeats:
        """Return an empty record of beats."""
        return Heartbeats(suspect_s=self.heartbeat_limit_s / 2, limit_s=self.heartbeat_limit_s, look_s=self.look_s)

    def token_limits(self) -> TokenLimits:
        """Return the limits of the token watchdog."""
        return TokenLimits(
            floor_s=self.token_limit_s,
            first_floor_s=self.first_token_limit_s,
            slack=self.token_slack,
            prefill_tokens_per_s=self.prefill_tokens_per_s,
            max_s=self.token_limit_max_s,
            batch_tokens=self.prefill_batch_tokens,
            look_s=self.look_s,
        )
