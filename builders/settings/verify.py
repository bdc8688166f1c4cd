"""VerifySettings: on what the candidate is compared with its reference, and what the gate allows."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from builders.settings.quantize import Recipe, TextsSettings
from serve.core.strict_model import StrictModel

_FOUR_BITS: frozenset[Recipe] = frozenset({"int4_awq", "nvfp4"})
# Ten times and more of what good 8-bit weights show; scales that are off by 8 % exceed it (docs/verification.md).
_AUTO_KL = 0.05


class TaskSettings(StrictModel):
    """The user's own questions."""

    name: str = Field(min_length=1)
    file: str = Field(
        description="JSON lines: `prompt` or `messages`, and `answer` (exact_match), `choices` and `answer` "
        "(multiple_choice), or `pattern` (regex); relative to the build file."
    )
    metric: Literal["exact_match", "multiple_choice", "regex"]
    max_tokens: PositiveInt = Field(default=32, description="Of each answer.")


class GateSettings(StrictModel):
    """The worst that is published. None: not looked at.

    What is measured is an estimate with a 95 % interval, and a small sample has a wide one. `decide_by` says what then
    counts: docs/verification.md.
    """

    decide_by: Literal["evidence", "estimate", "proof"] = Field(
        default="estimate",
        description="estimate: the estimate alone counts. evidence: refused if the estimate is beyond the limit, and "
        "the sample shows that there is any change at all; what it cannot tell is passed, and said. proof: refused "
        "unless the whole interval is within the limit, so that a sample that is too small is refused.",
    )
    max_accuracy_drop: NonNegativeFloat | None = Field(
        default=0.01,
        description="Of every task, and of predicting the next token of the texts: absolute, 0.01 is one percent.",
    )
    min_greedy_agreement: float | None = Field(default=None, ge=0, le=1, description="Share of tokens.")
    max_kl_divergence: Literal["auto"] | NonNegativeFloat | None = Field(
        default="auto",
        description="Nats a token. auto: 0.05 unless the recipe has 4-bit weights, which small models feel more.",
    )
    max_perplexity_ratio: NonNegativeFloat | None = Field(default=1.05, description="Candidate over reference.")

    def kl_limit(self, recipe: Recipe) -> float | None:
        """Return the limit of the KL divergence for weights of a recipe, in nats a token; None: there is none."""
        if self.max_kl_divergence != "auto":
            return self.max_kl_divergence
        return None if recipe in _FOUR_BITS else _AUTO_KL


class VerifySettings(StrictModel):
    """The accuracy gate."""

    texts: TextsSettings = Field(
        default=TextsSettings(samples=64, seed=1), description="For agreement, KL, perplexity."
    )
    output_tokens: PositiveInt = Field(default=32, description="Greedy tokens after each text's beginning.")
    tasks: tuple[TaskSettings, ...] = ()
    gate: GateSettings = GateSettings()
    reference_engine: Literal["auto", "transformers"] = Field(
        default="auto",
        description="What computes the reference. auto: the engine that serves the bundle, with the unquantized "
        "checkpoint; transformers, if that does not start.",
    )
    reference_device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Of the transformers engine; cpu: for a model that fits no GPU unquantized."
    )
    golden_samples: PositiveInt = Field(default=4, description="Answers that replicas repeat when they start.")
