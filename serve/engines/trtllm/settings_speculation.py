"""Settings of speculative decoding: who drafts the tokens that the model then checks."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from serve.core.strict_model import StrictModel


class _PytorchSpeculation(StrictModel):
    max_batch_size: PositiveInt | None = Field(
        default=None, description="With more sequences in the batch nothing is drafted; None: no limit."
    )


class DraftModelSettings(_PytorchSpeculation):
    """A small model of the same vocabulary drafts. PyTorch backend only."""

    kind: Literal["draft_model"]
    draft_tokens: PositiveInt = Field(default=4, description="Tokens that are drafted at once.")
    model: str = Field(
        min_length=1, description="Checkpoint directory of the small model, the same path on every node."
    )


class EagleSettings(StrictModel):
    """EAGLE-1 or EAGLE-2: a small head drafts from the model's hidden states. TensorRT backend (1.2.x) only."""

    kind: Literal["eagle"]
    draft_tokens: PositiveInt = Field(default=4, description="Tokens that are drafted at once.")
    model: str = Field(min_length=1, description="Checkpoint directory of the head, the same path on every node.")
    greedy: bool = Field(default=True, description="Accept only the likeliest token; false: typical acceptance.")


class Eagle3Settings(_PytorchSpeculation):
    """EAGLE-3: a small head drafts from hidden states of several layers. PyTorch backend only."""

    kind: Literal["eagle3"]
    draft_tokens: PositiveInt = Field(default=4, description="Tokens that are drafted at once.")
    model: str = Field(min_length=1, description="Checkpoint directory of the head, the same path on every node.")
    one_model: bool = Field(default=True, description="Run the head inside the model's own step, which is faster.")
    layers: tuple[int, ...] = Field(default=(), description="Layers whose hidden states are used; (): the usual three.")


class NgramSettings(_PytorchSpeculation):
    """What followed the same tokens earlier is the draft; needs no further model. PyTorch backend only."""

    kind: Literal["ngram"]
    draft_tokens: PositiveInt = Field(default=4, description="Tokens that are drafted at once.")
    match_tokens: PositiveInt = Field(default=2, description="Longest run of tokens that is looked up.")
    keep_all: bool = Field(default=True, description="Keep every continuation that was seen, not just one.")
    use_oldest: bool = Field(default=True, description="Draft the oldest continuation; false: the newest.")
    shared: bool = Field(default=True, description="All requests look up in one pool; false: each in its own.")


class MtpSettings(_PytorchSpeculation):
    """Multi-token prediction by layers of the checkpoint itself, as DeepSeek's has them. PyTorch backend only."""

    kind: Literal["mtp"]
    draft_tokens: PositiveInt = Field(default=1, description="Tokens that are drafted at once: prediction layers used.")
    relaxed_thinking: bool = Field(
        default=False, description="While the model thinks, also accept drafts that are nearly the likeliest."
    )
    relaxed_top_k: PositiveInt = Field(default=1, description="How many of the likeliest tokens are near enough.")
    relaxed_delta: NonNegativeFloat = Field(default=0.0, description="How much less likely than the first they may be.")


SpeculationSettings = Annotated[
    DraftModelSettings | EagleSettings | Eagle3Settings | NgramSettings | MtpSettings, Field(discriminator="kind")
]
