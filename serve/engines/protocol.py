"""Engine port: one model, loaded on every rank of one worker group, in our own words."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from serve.core.kv_events import KvEventBatch
from serve.core.request import GenerateRequest, TokenDelta


@dataclass(frozen=True)
class EngineInfo:
    """What is fixed once an engine has started.

    Attributes:
        engine: Name of the adapter, and its version: for instance `transformers 5.23.0`.
        context_tokens: Prompt and output of one sequence, together, at most.
        vocab_size: Token ids are below this.
        tokens_per_block: Size of a KV block.
        total_blocks: KV blocks there are.
        device: Where it runs: `cpu`, `cuda`, `simulated`.
        max_logprobs: Largest `logprobs` and `prompt_logprobs` that are accepted.
    """

    engine: str
    context_tokens: int
    vocab_size: int
    tokens_per_block: int
    total_blocks: int
    device: str
    max_logprobs: int = 20


@dataclass(frozen=True)
class EngineStats:
    """Load of an engine at one moment.

    Attributes:
        running: Sequences in the batch.
        waiting: Sequences accepted, no KV blocks yet.
        used_blocks: KV blocks held by running sequences.
        cached_blocks: Further blocks whose content is kept for reuse; evicted when room is needed.
        total_blocks: All there are.
        queued_prefill_tokens: Prompt tokens accepted and neither computed nor found in the cache yet.
        step_s: Duration of the last step of the batch; 0 before the first.
        prompt_tokens, cached_prompt_tokens, generated_tokens: Totals since the start.
        steps: Total of steps in which something was computed; 0 if the engine does not count them.
        busy_s: Total duration of those steps.
        computed_prompt_tokens: Total of prompt tokens computed in those steps; 0 if the engine does not count them.
        computed_prompt_pairs: Total of (query, key) pairs of their causal attention; 0 if unknown.
    """

    running: int = 0
    waiting: int = 0
    used_blocks: int = 0
    cached_blocks: int = 0
    total_blocks: int = 0
    queued_prefill_tokens: int = 0
    step_s: float = 0.0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    busy_s: float = 0.0
    computed_prompt_tokens: int = 0
    computed_prompt_pairs: float = 0.0


class Engine(Protocol):
    """One model, ready to generate. Every method is called on one event loop, and none blocks it."""

    @property
    def info(self) -> EngineInfo:
        """What is fixed once the engine has started. Only valid after `start`."""

    async def start(self) -> None:
        """Load the model on every rank.

        Raises:
            ConfigError: The configuration asks for what this engine or machine does not have.
            BundleMismatch: Hardware or software is not what the bundle was made for; no GPU memory was taken.
        """

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        """Stream output tokens in order. The first delta has `prefill`, only the last one a `finish_reason`.

        Closing the generator cancels the request and frees its KV blocks.

        Raises:
            RequestError: The engine cannot do what is asked, or the prompt does not fit; nothing was taken.
            Overloaded: As many sequences are waiting as the configuration allows.
            EngineDead: A rank was lost, or the engine stopped; the replica has to be replaced.
        """

    def stats(self) -> EngineStats:
        """Return the latest load. Never raises."""

    def kv_events(self) -> AsyncGenerator[KvEventBatch, None]:
        """Stream the content of the KV cache: first a snapshot of all of it, then every change.

        A consumer that falls behind gets another snapshot, never a gap. Any number of consumers.
        """

    def check_health(self) -> None:
        """Raise `EngineDead` if the engine cannot make progress any more. Never blocks."""

    async def stop(self) -> None:
        """Release every rank; running generators raise `EngineDead`. Safe to call twice, or before `start`."""
