"""Errors of builds. Like all of ours, they are rebuilt from their `args` in another process."""

from serve.errors import RayTRTError


class BuildFailed(RayTRTError):
    """A step failed, and trying again will not help; what other steps made is kept.

    Args:
        step: Its name.
        message: What happened, and the remedy.
    """

    def __init__(self, step: str, message: str) -> None:
        super().__init__(step, message)
        self.step = step
        self.message = message

    def __str__(self) -> str:
        return f"step {self.step}: {self.message}"


class GateRefused(BuildFailed):
    """The candidate is worse than its reference by more than the gate allows; its report is kept."""
