"""`python -m builders`: see `builders.cli`."""

import argparse
import sys

from builders.cli import INTERRUPTED, MISTAKE, add_arguments, run
from serve.errors import ConfigError


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m builders", description="Make an engine bundle from a build file.")
    add_arguments(parser)
    try:
        return run(parser.parse_args())
    except ConfigError as exc:
        print(f"raytrt: {exc}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("raytrt build: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
