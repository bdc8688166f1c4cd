"""Small fleets and workloads of the simulator's tests."""

from collections.abc import Sequence

from hypothesis import strategies as st

from serve.engines.simulated.settings import FixedLatencySettings, SimulatedSettings
from sim.workload import SimRequest

SIZE = 10  # tokens of a block


def engine(
    *,
    total_blocks: int = 1000,
    max_batch_size: int = 8,
    max_waiting: int = 4096,
    prefill_tokens_per_s: float = 1000.0,
    decode_step_s: float = 0.1,
    max_num_tokens: int = 4096,
    scheduling: str = "guaranteed_no_evict",
    tokens_per_block: int = SIZE,
) -> SimulatedSettings:
    """Return an engine whose times can be told by hand."""
    return SimulatedSettings.model_validate(
        {
            "tokens_per_block": tokens_per_block,
            "total_blocks": total_blocks,
            "max_batch_size": max_batch_size,
            "max_waiting": max_waiting,
            "max_num_tokens": max_num_tokens,
            "scheduling": scheduling,
            "latency": FixedLatencySettings(prefill_tokens_per_s=prefill_tokens_per_s, decode_step_s=decode_step_s),
        }
    )


def request(
    arrival_s: float,
    prompt_tokens: int,
    output_tokens: int,
    *,
    text: int = 0,
    shared: int | None = None,
    max_tokens: int = 0,
) -> SimRequest:
    """Return a request; those of equal `text` share a prefix, or `shared` blocks of it at most."""
    blocks = prompt_tokens // SIZE
    common = blocks if shared is None else min(shared, blocks)
    hashes = [1 + text * 1000 + block for block in range(common)]
    # A chained hash is different after a different prefix.
    hashes += [abs(hash((arrival_s, text, common, block))) for block in range(common, blocks)]
    return SimRequest(arrival_s, prompt_tokens, output_tokens, tuple(hashes), max_tokens)


@st.composite
def workloads(draw: st.DrawFn) -> Sequence[SimRequest]:
    """Up to 30 requests that share prefixes, within a second."""
    arrivals = sorted(draw(st.lists(st.integers(0, 1000), min_size=1, max_size=30)))
    return [
        request(
            arrival / 1000,
            draw(st.integers(1, 300)),
            draw(st.integers(0, 40)),
            text=draw(st.integers(0, 3)),
            shared=draw(st.integers(0, 30)),
        )
        for arrival in arrivals
    ]
