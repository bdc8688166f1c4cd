"""What building the application failed of, told to the `raytrt up` that waits for it.

Serve builds the application in a process of its own, and says in its controller's log only why that failed.
"""

import contextlib
import os
from pathlib import Path

VARIABLE = "RAYTRT_BUILD_REPORT"


def report(error: Exception) -> None:
    """Tell a `raytrt up` on this machine, if there is one."""
    if path := os.environ.get(VARIABLE):
        with contextlib.suppress(OSError):  # another machine, or it has gone
            Path(path).write_text(str(error))


def read(path: Path) -> str | None:
    """Return what was told; None: nothing."""
    try:
        return path.read_text() or None
    except OSError:
        return None
