"""RouteHints: what routing may know of a sequence besides its GenerateRequest."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RouteHints:
    """Said by the HTTP request that the sequence belongs to.

    Attributes:
        request_id: The x-request-id that the client got; clients choose it, so it may not be unique.
        session: Requests of one session would like one replica; empty: none.
        tenant: Who is accountable; empty: the default tenant.
        arrived_s: `time.monotonic()` when the request reached the gateway; 0: when it is routed.
        limited: Whether the client named an output limit.
        priority: Lower is served first, while not all can be.
    """

    request_id: str = ""
    session: str = ""
    tenant: str = ""
    arrived_s: float = 0.0
    limited: bool = True
    priority: int = 0


NO_HINTS = RouteHints()
