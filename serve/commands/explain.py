"""`raytrt explain`: print the TensorRT-LLM constructor call that a config file leads to."""

import argparse
from pathlib import Path

from serve.engines.trtllm.line import Line
from serve.explain_config import explain_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("config", type=Path, help="Serve config file, or a part of one")
    parser.add_argument("--line", choices=[line.value for line in Line], help="of TensorRT-LLM; without it, each")


def run(options: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit status.

    Raises:
        ConfigError: The file has a mistake.
    """
    explanation = explain_file(options.config, options.line)
    print(explanation.text)
    return 0 if explanation.works else 2
