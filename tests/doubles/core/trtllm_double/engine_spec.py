"""EngineSpec: what a rank has to know, as plain values that can be sent to any process."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_double import switches

if TYPE_CHECKING:
    from trtllm_double.core import EngineCore


@dataclass(frozen=True)
class EngineSpec:
    """One engine.

    Attributes:
        line: Which line it imitates.
        model: Directory of the checkpoint; of an engine directory, the checkpoint that it was made from.
        limits: Keywords of CoreLimits; numbers of blocks are decided with the model at hand.
    """

    line: str
    model: str
    dummy: bool
    tensor_parallel: int
    pipeline_parallel: int
    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int | None
    tokens_per_block: int
    max_tokens: int | None
    memory_fraction: float
    host_bytes: int
    chunked_prefill: bool
    guaranteed: bool
    reuse: bool
    partial_reuse: bool
    min_offload_priority: int
    event_buffer: int
    attention_windows: tuple[int, ...]
    attention_dp: bool
    stats: bool
    request_stats: bool
    max_stats_len: int
    includes_end_id: bool

    @property
    def world_size(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel


def make_core(spec: EngineSpec) -> "EngineCore":
    """Load the model and lay out the cache."""
    from trtllm_double.core import CoreLimits, EngineCore
    from trtllm_double.model import LlamaModel

    time.sleep(switches.number("LOAD_S", 0))
    text = switches.take_fault("fail_start")
    if text is not None:
        raise RuntimeError(text)
    model = LlamaModel(Path(spec.model), dummy=spec.dummy)
    tokens = spec.max_tokens or int(switches.number("KV_TOKENS", 36_408) * spec.memory_fraction)
    primary = max(1, tokens // spec.tokens_per_block)
    secondary = spec.host_bytes // (model.bytes_per_token * spec.tokens_per_block)
    # Upstream cuts the sequence length to what the cache can hold.
    max_seq_len = min(spec.max_seq_len or model.max_position, primary * spec.tokens_per_block)
    windows = sorted({min(window, max_seq_len) for window in spec.attention_windows}) or [max_seq_len]
    limits = CoreLimits(
        max_batch_size=spec.max_batch_size,
        max_num_tokens=spec.max_num_tokens,
        max_seq_len=max_seq_len,
        tokens_per_block=spec.tokens_per_block,
        primary_blocks=primary,
        secondary_blocks=secondary,
        chunked_prefill=spec.chunked_prefill,
        guaranteed=spec.guaranteed,
        reuse=spec.reuse,
        partial_reuse=spec.partial_reuse,
        min_offload_priority=spec.min_offload_priority,
        event_buffer=spec.event_buffer if spec.reuse else 0,
        attention_windows=windows,
        attention_dp_rank=0 if spec.attention_dp else None,
        stats=spec.stats,
        request_stats=spec.request_stats,
        max_stats_len=spec.max_stats_len,
        includes_end_id=spec.includes_end_id,
    )
    return EngineCore(model, limits)
