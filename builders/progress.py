"""ProgressBoard: where the processes of a build's steps tell how far they are, and the driver looks.

It is an actor that the driver starts once a build has gone on for a while; short ones do without. Steps find it by its
name, and tell nobody as long as it is not there.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SEND_EVERY_S = 0.25
_LOOK_EVERY_S = 1.0


@dataclass(frozen=True)
class Progress:
    """How far a step is: `done` of `total` units of whatever it counts, and what it is at."""

    done: float
    total: float
    message: str = ""


class ProgressBoard:
    """An actor that keeps the last word of each step."""

    def __init__(self) -> None:
        self._last: dict[str, Progress] = {}

    def tell(self, step: str, progress: Progress) -> None:
        """Replace what a step told."""
        self._last[step] = progress

    def read(self) -> Mapping[str, Progress]:
        """Return the last word of each step."""
        return dict(self._last)


class Reporter:
    """What a step is given to tell its progress: a call costs an assignment; a thread sends the last word now and then.

    Args:
        find_board: Returns a handle of the actor, or None.
        step: Name of the step.
    """

    def __init__(self, find_board: Callable[[], Any], step: str) -> None:
        self._find_board = find_board
        self._step = step
        self._last: Progress | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._send_again_and_again, name="progress", daemon=True)
        self._thread.start()

    def __call__(self, done: float, total: float, message: str = "") -> None:
        """Tell progress; see `StepProgress`."""
        self._last = Progress(float(done), float(total), message)

    def close(self) -> None:
        """Stop sending."""
        self._closed.set()
        self._thread.join(timeout=2 * _LOOK_EVERY_S)

    def _send_again_and_again(self) -> None:
        sent: Progress | None = None
        board = self._find_board()
        while not self._closed.wait(_LOOK_EVERY_S if board is None else SEND_EVERY_S):
            board = board or self._find_board()
            last = self._last
            if board is not None and last is not None and last != sent:
                sent = last
                board.tell.remote(self._step, last)
