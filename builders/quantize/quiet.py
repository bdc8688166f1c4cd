"""Keep libraries that print, warn and draw progress bars from doing so; what they print goes to our log as DEBUG."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

logger = logging.getLogger(__name__)


class _LogStream(io.TextIOBase):
    """Makes log lines of what is written; a progress bar's updates are dropped."""

    def __init__(self) -> None:
        self._rest = ""
        self._busy = False

    def write(self, text: str) -> int:
        if self._busy:  # a handler of the log that writes here
            return len(text)
        self._busy = True
        try:
            self._log(text)
        finally:
            self._busy = False
        return len(text)

    def _log(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if shown := line.rpartition("\r")[2].strip():
                logger.debug("%s", shown)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' output, in this whole process: for a step that has its process to itself."""
    stream = _LogStream()
    with redirect_stdout(stream), redirect_stderr(stream), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
