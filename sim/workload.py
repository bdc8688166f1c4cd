"""SimRequest and Workload: requests in tokens and block hashes, in the order of their arrival."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class SimRequest:
    """A request as the gateway would see it, and how long its output turns out.

    Attributes:
        arrival_s: From the begin of the workload.
        prompt_tokens: > 0.
        output_tokens: >= 0; known to the engine only.
        hashes: Chained hashes of the prompt's full blocks.
        max_tokens: What the client asks for at most; 0: it names no limit.
        output_hashes: Hashes of the blocks that the output completes, the prompt's chain continued; empty if nobody
            will ever ask for them.
        session, tenant, lora: As in `RouteRequest`.
        priority: Lower is served first, where requests have to wait in the gateway.
        measured_ttft_s, measured_duration_s: What a log says of it; 0: unknown.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    hashes: Sequence[int] = ()
    max_tokens: int = 0
    output_hashes: Sequence[int] = ()
    session: str = ""
    tenant: str = ""
    lora: str = ""
    priority: int = 0
    measured_ttft_s: float = 0.0
    measured_duration_s: float = 0.0


@dataclass(frozen=True)
class Workload:
    """Requests.

    Attributes:
        name: For reports.
        requests: By `arrival_s`, which begins at 0.
        tokens_per_block: Of their hashes.
    """

    name: str
    requests: tuple[SimRequest, ...]
    tokens_per_block: int

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last."""
        return self.requests[-1].arrival_s if self.requests else 0.0

    def faster(self, rate: float) -> "Workload":
        """Return the same requests, arriving `rate` > 0 times as fast."""
        if rate == 1.0:
            return self
        requests = (replace(request, arrival_s=request.arrival_s / rate) for request in self.requests)
        return replace(self, requests=tuple(requests))

    def first(self, count: int | None) -> "Workload":
        """Return the first `count` requests."""
        return self if count is None else replace(self, requests=self.requests[:count])

    def coarser(self, tokens_per_block: int) -> "Workload":
        """Return the same requests with larger blocks. A chained hash of a block stands for all before it, too.

        Args:
            tokens_per_block: A multiple of the present size.
        """
        factor = tokens_per_block // self.tokens_per_block
        if factor == 1:
            return self
        requests = tuple(_coarser(request, factor) for request in self.requests)
        return replace(self, requests=requests, tokens_per_block=tokens_per_block)


def make_workload(name: str, requests: Iterable[SimRequest], tokens_per_block: int) -> Workload:
    """Put requests in order, and let the first arrive at 0."""
    ordered = sorted(requests, key=lambda request: request.arrival_s)
    start_s = ordered[0].arrival_s if ordered else 0.0
    if start_s:
        ordered = [replace(request, arrival_s=request.arrival_s - start_s) for request in ordered]
    return Workload(name, tuple(ordered), tokens_per_block)


def _coarser(request: SimRequest, factor: int) -> SimRequest:
    # The first output block of the new size may begin within the prompt.
    blocks = len(request.hashes)
    output = tuple(request.output_hashes)[factor - 1 - blocks % factor :: factor]
    return replace(request, hashes=tuple(request.hashes)[factor - 1 :: factor], output_hashes=output)
