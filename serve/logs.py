"""Where RayTRT's log lines go: stderr of each process, which Ray keeps in a file and shows on the driver's terminal."""

import logging


def configure_logging(level: int = logging.INFO) -> None:
    """Let the loggers below `serve` write to stderr, whatever Ray Serve's own log level is. Safe to call again."""
    root = logging.getLogger("serve")
    root.setLevel(level)
    root.propagate = False
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(name)s: %(message)s"))
        root.addHandler(handler)
