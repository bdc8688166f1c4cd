"""ProgressBoard: where the processes of a build's steps tell how far they are, and the driver looks."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SEND_EVERY_S = 0.25


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
        board: Handle of the actor; None: nobody listens.
        step: Name of the step.
    """

    def __init__(self, board: Any, step: str) -> None:
        self._board = board
        self._step = step
        self._last: Progress | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._send_again_and_again, name="progress", daemon=True)
        if board is not None:
            self._thread.start()

    def __call__(self, done: float, total: float, message: str = "") -> None:
        """Tell progress; see `StepProgress`."""
        self._last = Progress(float(done), float(total), message)

    def close(self) -> None:
        """Stop sending."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * SEND_EVERY_S)

    def _send_again_and_again(self) -> None:
        sent: Progress | None = None
        while not self._closed.is_set():
            last = self._last
            if last is not None and last != sent:
                sent = last
                self._board.tell.remote(self._step, last)
            time.sleep(SEND_EVERY_S)
