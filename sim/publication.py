"""KvMessage and LoadMessage: what a replica publishes, as `serve.router.publisher` does it.

A message is made when something happens, and sent at `at_s`, which may be a little later: until then, what else happens
goes into it.
"""

from serve.core.kv_events import KvEvent
from serve.core.routing.load import LoadReport
from serve.engines.simulated.latency import DecodeRun


class KvMessage:
    """Changes of a replica's cache.

    Attributes:
        replica: Number of the replica.
        at_s: When it is sent.
        events: In order.
        is_sent: Whether somebody has it: nothing can be added.
    """

    __slots__ = ("at_s", "events", "is_sent", "replica")

    def __init__(self, replica: int, at_s: float) -> None:
        self.replica = replica
        self.at_s = at_s
        self.events: list[KvEvent] = []
        self.is_sent = False


class LoadMessage:
    """A replica's load.

    What only decoding changes (context, output, steps) goes on between the engine's events without any work here: a
    message can be asked what a later one would say, as long as the engine has no other event.

    Attributes:
        replica, at_s, is_sent: As of `KvMessage`.
        accepted: Route ids of what was accepted since the message before.
    """

    __slots__ = ("_load", "_run", "accepted", "at_s", "is_sent", "replica")

    def __init__(self, replica: int, at_s: float) -> None:
        self.replica = replica
        self.at_s = at_s
        self.is_sent = False
        self.accepted: list[int] = []
        self._load = LoadReport()
        self._run: tuple[float, DecodeRun] | None = None

    def show(self, load: LoadReport, run: tuple[float, DecodeRun] | None) -> None:
        """Let it say what is so after the engine's latest event, and which run of decode steps has begun, and when."""
        self._load, self._run = load, run

    @property
    def goes_on(self) -> bool:
        """Whether later reports differ by what is decoded meanwhile."""
        return self._run is not None

    def report(self, at_s: float, accepted: tuple[int, ...] = ()) -> LoadReport:
        """Return the report of `at_s`."""
        load = self._load
        steps, busy_s = 0, 0.0
        if self._run is not None:
            began_s, run = self._run
            steps = run.steps_within(max(0.0, at_s - began_s))
            busy_s = run.duration_s(steps)
        tokens = steps * load.running
        return LoadReport(
            load.running,
            load.waiting,
            load.queued_prefill_tokens,
            load.used_blocks,
            load.total_blocks,
            load.committed_blocks,
            load.context_tokens + tokens,
            load.prefilled_tokens,
            load.prefilled_pairs,
            load.generated_tokens + tokens,
            load.steps + steps,
            load.busy_s + busy_s,
            load.read_tokens + steps * load.context_tokens + load.running * (steps * (steps - 1) // 2),
            accepted,
        )


Message = KvMessage | LoadMessage
