"""Where RayTRT's log lines go: stderr of each process, which Ray keeps in a file and shows on the driver's terminal."""

import logging
import sys


def configure_logging(level: int = logging.INFO) -> None:
    """Let the loggers below `serve` write to stderr, whatever Ray Serve's own log level is. Safe to call again."""
    root = logging.getLogger("serve")
    root.setLevel(level)
    root.propagate = False
    if not root.handlers:
        # Not sys.stderr: Ray Serve may have replaced it by a logger of its own, which drops what is below its level.
        handler = logging.StreamHandler(sys.__stderr__)
        handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(name)s: %(message)s"))
        root.addHandler(handler)
