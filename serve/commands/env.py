"""`raytrt env`: print the environment that Ray's processes should have, for eval."""

import argparse
import shlex

from serve.flags import SERVE_FLAGS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments: there are none."""


def run(options: argparse.Namespace) -> int:
    """Print it."""
    for name, value in SERVE_FLAGS.items():
        print(f"export {name}={shlex.quote(value)}")
    return 0
