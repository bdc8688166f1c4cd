"""`raytrt`: the commands by name. Only the module of the one that is asked for is imported: some take seconds."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from serve.errors import ConfigError, RayTRTError


class CommandModule(Protocol):
    """What the module of a command has."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""

    def run(self, options: argparse.Namespace) -> int:
        """Do what the arguments say; returns the exit status.

        Raises:
            ConfigError: The user made a mistake.
        """


@dataclass(frozen=True)
class Command:
    """Where a command is, and what it does, in a line."""

    module: str
    summary: str


COMMANDS = {
    "plan": Command("builders.plan.cli", "a model, GPUs and a goal -> layout, quantization, replicas, cost"),
    "build": Command("builders.cli", "make an engine bundle: quantize, compile, tune, verify, publish"),
    "bundles": Command("serve.bundle_commands", "list, compare, promote, roll back, verify and remove bundles"),
    "up": Command("serve.commands.up", "start a config file on this machine and wait until it answers"),
    "deploy": Command("serve.deploy", "bring a config file to a running Ray Serve, and back if it fails"),
    "check": Command("serve.commands.check", "check a config file without starting anything"),
    "explain": Command("serve.commands.explain", "print the TensorRT-LLM call that a config file leads to"),
    "simulate": Command("sim.cli", "replay a trace through simulated replicas; compare or recommend routing policies"),
    "env": Command("serve.commands.env", "print the environment that Ray's processes should have, for eval"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in COMMANDS:
        _overview().parse_args(words)  # prints help or what is wrong, and exits
    name, *rest = words
    module: CommandModule = importlib.import_module(COMMANDS[name].module)
    parser = argparse.ArgumentParser(prog=f"raytrt {name}", description=module.__doc__)
    module.add_arguments(parser)
    options = parser.parse_args(rest)
    try:
        status = module.run(options)
        sys.stdout.flush()
        return status
    except RayTRTError as exc:
        print(f"raytrt: {exc}", file=sys.stderr)
        return 2 if isinstance(exc, ConfigError) else 1
    except BrokenPipeError:  # who read the output, for instance `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"raytrt {name}: interrupted", file=sys.stderr)
        return 130


def _overview() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="raytrt", description="TensorRT-LLM served on Ray Serve. `raytrt COMMAND --help` tells more of a command."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.summary)
    return parser


if __name__ == "__main__":
    sys.exit(main())
