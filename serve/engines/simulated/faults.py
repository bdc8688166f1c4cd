"""Scripted faults: what goes wrong, when, and how often."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from serve.core.strict_model import StrictModel


class Fault(StrictModel):
    """One thing that goes wrong, once all that it waits for has come to pass."""

    kind: Literal["die", "exit", "hang", "slow", "error_request", "fail_start"] = Field(
        description="die: a rank is lost, and the engine knows. exit: the process ends at once. hang: no step ends any "
        "more, and the engine says that it is healthy. slow: steps take `factor` times as long. error_request: "
        "a request is refused. fail_start: `start` raises."
    )
    after_tokens: NonNegativeInt = Field(default=0, description="Tokens the engine has generated.")
    after_requests: NonNegativeInt = Field(default=0, description="Requests the engine has accepted.")
    at_s: NonNegativeFloat = Field(default=0.0, description="Time since the engine started.")
    factor: PositiveFloat = Field(default=10.0, description="slow: how many times as long a step takes.")
    for_s: PositiveFloat | None = Field(default=None, description="hang, slow: until when; None: for good.")
    exit_code: int = Field(default=1, description="exit: status of the process.")
    times: PositiveInt = Field(default=1, description="How often it happens, in this process or under `ledger`.")
    ledger: Path | None = Field(
        default=None,
        description="An existing directory in which each occurrence leaves a file, so that `times` counts over all "
        "replicas that share it, and over their restarts. None: each engine counts its own.",
    )


class FaultScript:
    """The faults of one engine that are still to come.

    Args:
        faults: In the order in which they are considered.
    """

    def __init__(self, faults: tuple[Fault, ...]) -> None:
        self._faults = faults
        self._left = [fault.times for fault in faults]

    def due(self, kinds: frozenset[str], *, tokens: int = 0, requests: int = 0, running_s: float = 0.0) -> Fault | None:
        """Return the next fault of these kinds that is due, and count it as having happened."""
        for index, fault in enumerate(self._faults):
            if not self._left[index] or fault.kind not in kinds:
                continue
            if tokens < fault.after_tokens or requests < fault.after_requests or running_s < fault.at_s:
                continue
            self._left[index] -= 1
            if _claim(fault):
                return fault
        return None


def _claim(fault: Fault) -> bool:
    """Enter an occurrence in the ledger; return whether there was room for it."""
    if fault.ledger is None:
        return True
    for number in range(fault.times):
        try:
            os.close(os.open(fault.ledger / f"{fault.kind}-{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            continue
        return True
    return False
