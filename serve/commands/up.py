"""`raytrt up`: start a config file on this machine and wait until it answers."""

import argparse
from pathlib import Path

from serve.config_file import read_config_file
from serve.up import up


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("config", type=Path, help="Serve config file, for instance configs/quickstart.yaml")
    parser.add_argument("--address", help="address of a running Ray cluster; without it, Ray is started here")


def run(options: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit status.

    Raises:
        ConfigError: The file has a mistake.
    """
    return up(read_config_file(options.config), options.address)
