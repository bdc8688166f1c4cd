"""`raytrt plan`: from a model, GPUs and a goal to layout, quantization, batch sizes, replicas, latency and cost.

Nothing is started and no GPU is needed. Exit status: 0 there is a plan; 1 there is none, and what would make one
possible is shown; 2 a mistake on the command line.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from builders.plan.choose import Choice, choose
from builders.plan.files import bundle_name, write_files
from builders.plan.goal import Goal, Objective, read_goal
from builders.plan.model_source import find_model
from builders.plan.offers import parse_offers
from builders.plan.refusal import refuse
from builders.plan.report import choice_to_json, print_choice, print_refusal, refusal_to_json
from builders.plan.request import PlanRequest
from builders.plan.simulate import Simulated, simulate_plan
from builders.settings.quantize import Recipe
from serve.artifacts.manifest import BundleKind
from serve.engines.simulated.hardware import GPUS, Precision
from serve.engines.simulated.split import Precisions
from serve.errors import ConfigError

_GOAL_FLAGS = {
    "objective": (str, "NAME", f"what is best: {', '.join(Objective)}"),
    "ttft_ms": (float, "MS", "limit of the time to the first token"),
    "tpot_ms": (float, "MS", "limit of the time of each further token"),
    "percentile": (float, "P", "of the requests that have to meet the limits; default 95"),
    "rate": (float, "PER_S", "requests a second"),
    "input_tokens": (int, "N", "mean length of prompts; default 1024"),
    "output_tokens": (int, "N", "mean length of outputs; default 256"),
    "length_deviation": (float, "X", "standard deviation of both, as a share of the mean; default 0.5"),
    "cached_share": (float, "X", "share of the prompts' tokens that is found in the cache; default 0"),
    "headroom": (float, "X", "share of what a replica can carry that is kept free of the rate; default 0.1"),
    "context_tokens": (int, "N", "longest prompt and output together; default: what fits"),
    "gpus": (int, "N", "GPUs that there are, of each kind; default: as many as it takes"),
}
_GOAL_NAMES = {"rate": "rate_per_s", "gpus": "max_gpus"}
_SIMULATED = 3  # candidates
_WIDTH = 140  # of what goes into a file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "model",
        help="checkpoint directory, config.json, builtin:quickstart, organisation/model of the Hugging Face hub, or a "
        "name such as llama-3.1-8b",
    )
    hardware = parser.add_argument_group("hardware")
    hardware.add_argument(
        "--gpu",
        metavar="NAME[=PRICE][,...]",
        help=f"which GPUs may be used, with $/hour: {', '.join(GPUS)}; or cpu. Default: what this machine has",
    )
    hardware.add_argument("--gpus-per-node", type=int, metavar="N", help="default: as such nodes usually have")
    hardware.add_argument(
        "--gpu-dollars-per-hour", type=float, metavar="X", help="price of one GPU, if all cost the same"
    )
    goal = parser.add_argument_group("goal")
    goal.add_argument("--goal", type=Path, metavar="FILE", help="YAML with the same names; flags come before it")
    for name, (kind, metavar, text) in _GOAL_FLAGS.items():
        goal.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)
    _add_model(parser.add_argument_group("model and bundle"))
    _add_output(parser.add_argument_group("output"))


def _add_model(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--kind",
        choices=[kind.value for kind in BundleKind],
        help="what is built; default: trtllm-checkpoint, on a CPU transformers-checkpoint",
    )
    group.add_argument(
        "--quantize", metavar="RECIPE[,...]", help=f"quantizations that may be used, of {', '.join(get_args(Recipe))}"
    )
    group.add_argument(
        "--shape", metavar="KEY=VALUE[,...]", help="the model's shape, if its config.json is not understood"
    )
    group.add_argument("--weights", choices=get_args(Precision), help="with --shape: precision of the checkpoint")
    group.add_argument("--name", help="of model and bundle; default: made from model, GPU and recipe")
    group.add_argument("--source", help="where the build finds the checkpoint, if not where MODEL says")
    group.add_argument("--store", default="~/.raytrt/store", help="where the build publishes; default %(default)s")


def _add_output(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--explain", action="store_true", help="show the arithmetic of the chosen candidate")
    group.add_argument("--simulate", action="store_true", help=f"put the best {_SIMULATED} through the simulator, too")
    group.add_argument("--top", type=int, default=8, metavar="N", help="candidates to show; default %(default)s")
    group.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    group.add_argument("--write", type=Path, metavar="DIR", help="write build.yaml and deployment.yaml there")


def run(options: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit status.

    Raises:
        ConfigError: Something is wrong with them, or with a file.
    """
    request = make_request(options)
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _WIDTH
    choice = choose(request)
    if choice is None:
        refusal = refuse(request)
        if options.json:
            print(json.dumps(refusal_to_json(refusal)))
        else:
            print_refusal(console, refusal)
        return 1
    top = max(1, options.top)
    simulated = _simulate(choice, top) if options.simulate else {}
    if options.json:
        print(json.dumps(choice_to_json(choice, top, simulated)))
    else:
        print_choice(console, choice, top=top, explained=options.explain, simulated=simulated)
    if options.write is not None:
        _write(options, choice, Console(stderr=True, highlight=False, soft_wrap=True))
    return 0


def make_request(options: argparse.Namespace) -> PlanRequest:
    """Return what the arguments ask for.

    Raises:
        ConfigError: Something is wrong with them.
    """
    model = find_model(options.model, options.shape)
    if options.weights is not None:
        if options.shape is None:
            raise ConfigError("--weights is for --shape; a checkpoint says its precision itself: remove it")
        quantized = options.weights != "bf16"
        model = replace(model, precisions=Precisions(weights=options.weights), is_quantized=quantized)
    if options.source is not None:
        model = replace(model, location=options.source)
    offers = parse_offers(options.gpu, options.gpu_dollars_per_hour, options.gpus_per_node)
    is_cpu = any(offer.gpu.generation == "cpu" for offer in offers)
    kind = BundleKind(options.kind) if options.kind else None
    if is_cpu and kind not in (None, BundleKind.TRANSFORMERS_CHECKPOINT):
        raise ConfigError(f"--kind={options.kind} needs a GPU; use transformers-checkpoint, or name one by --gpu")
    default = BundleKind.TRANSFORMERS_CHECKPOINT if is_cpu else BundleKind.TRTLLM_CHECKPOINT
    return PlanRequest(model, _goal(options), offers, kind or default, _recipes(options.quantize))


def _goal(options: argparse.Namespace) -> Goal:
    given: dict[str, Any] = {}
    for flag in _GOAL_FLAGS:
        value = getattr(options, flag)
        if value is not None:
            given[_GOAL_NAMES.get(flag, flag)] = value
    return read_goal(options.goal, given)


def _recipes(text: str | None) -> tuple[Recipe, ...] | None:
    if text is None:
        return None
    known: tuple[Recipe, ...] = get_args(Recipe)
    asked = [part.strip() for part in text.split(",") if part.strip()]
    for recipe in asked:
        if recipe not in known:
            raise ConfigError(f"--quantize: there is no recipe {recipe!r}; there are {', '.join(known)}")
    return tuple(recipe for recipe in known if recipe in asked)


def _simulate(choice: Choice, top: int) -> dict[int, Simulated]:
    return {
        number: simulate_plan(choice.request, evaluation)
        for number, evaluation in enumerate(choice.shown(min(top, _SIMULATED)))
        if evaluation.state is not None and evaluation.state.rate_per_s > 0
    }


def _write(options: argparse.Namespace, choice: Choice, console: Console) -> None:
    name = options.name or bundle_name(choice.request, choice.best)
    try:
        for path in write_files(options.write, choice.request, choice.best, name, options.store):
            console.print(f"wrote {path}")
    except OSError as exc:
        raise ConfigError(f"--write={options.write}: {exc.strerror}; name a directory that can be written") from None
