"""Sequence: one request in the engine."""

from dataclasses import dataclass, field
from typing import Any

from trtllm_double.cache import Holding
from trtllm_double.engine_request import EngineRequest
from trtllm_double.model import KvBuffer


@dataclass(eq=False)
class Sequence:
    """Tokens, blocks, and what was told already."""

    request: EngineRequest
    max_tokens: int
    arrived_s: float
    output: list[int] = field(default_factory=list)
    holding: Holding | None = None
    kv: KvBuffer | None = None
    computed: int = 0
    cached: int = 0
    target: int = 0  # tokens to compute before the next one can be drawn
    sent: int = 0
    iterations: int = 0
    cumulative: float = 0.0
    logprobs: list[list[tuple[int, float, int]]] = field(default_factory=list)
    context_logits: list[Any] = field(default_factory=list)
    generation_logits: list[Any] = field(default_factory=list)
    scheduled_s: float = 0.0
    first_token_s: float = 0.0
    prompt_stored: bool = False

    @property
    def tokens(self) -> list[int]:
        return self.request.prompt + self.output
