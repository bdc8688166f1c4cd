"""`raytrt`: `up` starts a config file on this machine, `check` reads one, `explain` shows TensorRT-LLM's part of it.

`simulate` replays a trace against one (`sim`).
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from serve.config import ModelConfig
from serve.config_file import read_config_file
from serve.engines.trtllm.line import Line
from serve.engines.trtllm.settings import TrtllmSettings
from serve.errors import ConfigError
from serve.explain_config import explain_file, usable_lines
from serve.flags import SERVE_FLAGS
from serve.up import up
from sim.arguments import add_arguments
from sim.cli import run as simulate


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(argv)
    try:
        match options.command:
            case "up":
                return up(read_config_file(options.config), options.address)
            case "check":
                for name, config in read_config_file(options.config).applications.items():
                    print(f"{name}: {', '.join(_summary(model) for model in config.models)}: good")
            case "explain":
                explanation = explain_file(options.config, options.line)
                print(explanation.text)
                return 0 if explanation.works else 2
            case "simulate":
                return simulate(options)
            case "env":
                for name, value in SERVE_FLAGS.items():
                    print(f"export {name}={shlex.quote(value)}")
    except ConfigError as exc:
        print(f"raytrt: {exc}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="raytrt", description="TensorRT-LLM served on Ray Serve.")
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("up", help="start a config file on this machine and wait until it answers")
    start.add_argument("config", type=Path, help="Serve config file, for instance configs/quickstart.yaml")
    start.add_argument("--address", help="address of a running Ray cluster; without it, Ray is started here")
    check = commands.add_parser("check", help="check a config file without starting anything")
    check.add_argument("config", type=Path)
    show = commands.add_parser("explain", help="print the TensorRT-LLM constructor call that a config file leads to")
    show.add_argument("config", type=Path)
    show.add_argument("--line", choices=[line.value for line in Line], help="of TensorRT-LLM; without it, each")
    replay = "replay a trace through simulated replicas, and compare or recommend routing policies"
    add_arguments(commands.add_parser("simulate", help=replay, description=replay))
    commands.add_parser("env", help="print the environment that Ray's processes should have, for eval")
    return parser


def _summary(model: ModelConfig) -> str:
    """Describe a model that can run.

    Raises:
        ConfigError: No line of TensorRT-LLM can run it.
    """
    if not isinstance(model.engine, TrtllmSettings):
        return f"{model.id} ({model.engine.kind})"
    if model.resources.num_gpus == 0:
        print(
            f"raytrt: warning: models[{model.id}].resources.num_gpus=0: TensorRT-LLM computes on GPUs; only tests want "
            "this, remove it",
            file=sys.stderr,
        )
    lines = usable_lines(model, model.engine)
    only = "" if len(lines) == len(Line) else f" {lines[0]} only"
    return f"{model.id} ({model.engine.kind}{only})"


if __name__ == "__main__":
    sys.exit(main())
