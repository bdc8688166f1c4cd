"""`raytrt check`: check a config file without starting anything."""

import argparse
import sys
from pathlib import Path

from serve.artifacts.store import open_store
from serve.bundle_models import fallback_checkpoint, resolve_model
from serve.config import ModelConfig
from serve.config_file import read_config_file
from serve.engines.trtllm.line import Line
from serve.engines.trtllm.settings import TrtllmSettings
from serve.explain_config import usable_lines
from serve.pins import describe_bundle


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("config", type=Path, help="Serve config file")


def run(options: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit status.

    Raises:
        ConfigError: The file has a mistake.
    """
    for name, config in read_config_file(options.config).applications.items():
        models = [resolve_model(model, open_store) for model in config.models]
        for model in models:
            if model.bundle is not None:
                print(f"{name}: {model.config.id}: {describe_bundle(model.bundle)}")
                if model.config.fallback is not None:
                    fallback_checkpoint(model.config, model.bundle.manifest)  # for its errors
        print(f"{name}: {', '.join(_summary(model.config) for model in models)}: good")
    return 0


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
