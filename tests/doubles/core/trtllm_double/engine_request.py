"""What crosses the border between the LLM object and rank 0: plain, picklable values without classes of a line."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class EngineRequest:
    """One sequence. Token words are lists of token ids; `embedding_bias` is a numpy array, (vocab_size,)."""

    id: int
    prompt: list[int]
    max_tokens: int
    streaming: bool
    end_id: int | None
    stream_interval: int = 1
    stop_words: list[list[int]] = field(default_factory=list)
    bad_words: list[list[int]] = field(default_factory=list)
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    embedding_bias: Any = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_context_logits: bool = False
    return_generation_logits: bool = False
    salt_id: int | None = None
    lora_id: int | None = None
    priority: float = 0.5


@dataclass
class EngineResponse:
    """What one step brought for a request; `error` ends it as a RequestError.

    Attributes:
        tokens: New ones; all of them, if not streaming.
        logprobs: For each new token: [(token, logprob, rank), ...].
        prompt_logprobs: For each prompt token that was computed, what follows it.
        finish: None, or END_ID, STOP_WORDS, LENGTH, CANCELLED.
    """

    id: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[list[tuple[int, float, int]]] | None = None
    prompt_logprobs: list[list[tuple[int, float, int]]] | None = None
    context_logits: Any = None
    generation_logits: Any = None
    cumulative_logprob: float | None = None
    finish: str | None = None
    cached_tokens: int = 0
    decoding_iter: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    is_final: bool = False
