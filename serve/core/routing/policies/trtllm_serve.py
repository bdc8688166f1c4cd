"""TrtllmServePolicy: the KV-cache-aware router of trtllm-serve."""

import random
from dataclasses import dataclass
from typing import ClassVar

from serve.core.routing.decision import FleetView, PrefixMatch, Scores
from serve.core.routing.request import RouteRequest


@dataclass(frozen=True)
class TrtllmServePolicy:
    """Share of the prompt that is held, minus share of the batch that is taken.

        score = matched tokens / padded prompt tokens - requests / max_batch_size

    The prompt is padded to whole blocks, without its last token, which is always computed. The highest score wins,
    equal ones in turn.

    Attributes:
        max_batch_size: A constant of the router, not the engine's.

    Source: NVIDIA/TensorRT-LLM, tensorrt_llm/serve/router.py, `KvCacheAwareRouter`, 2026. Departure: blocks that most
    recent prompts begin with are credited to every replica.
    """

    max_batch_size: int = 64
    name: ClassVar[str] = "trtllm_serve"
    ties_at_random: ClassVar[bool] = False

    def score(self, request: RouteRequest, view: FleetView, match: PrefixMatch, rng: random.Random) -> Scores:
        padded_blocks = max(1, -(-(request.prompt_tokens - 1) // view.tokens_per_block))
        matched = match.credited_blocks / padded_blocks
        load = view.requests / self.max_batch_size
        return Scores(load - matched, {"matched": matched, "load": load})
