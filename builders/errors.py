"""Errors of builds. Like all of ours, they are rebuilt from their `args` in another process."""

from serve.errors import RayTRTError


class BuildFailed(RayTRTError):
    """A step failed, and trying again will not help; what other steps made is kept.

    Args:
        step: Its name.
        message: What happened, and the remedy.
        tail: The last lines that it printed.
        log: Where it printed them; for a gate's refusal, where its report is.
        mistake: The specification has to be changed.
    """

    def __init__(
        self, step: str, message: str, tail: tuple[str, ...] = (), log: str = "", mistake: bool = False
    ) -> None:
        super().__init__(step, message, tail, log, mistake)
        self.step = step
        self.message = message
        self.tail = tail
        self.log = log
        self.mistake = mistake

    def __str__(self) -> str:
        return f"step {self.step}: {self.message}"


class GateRefused(BuildFailed):
    """The candidate is worse than its reference by more than the gate allows; its report is kept."""
