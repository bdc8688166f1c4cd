"""The command line's arguments, and what they say of engines and numbers."""

import argparse
import os
from pathlib import Path
from typing import get_args

from serve.core.routing.settings import POLICY_NAMES
from serve.engines.simulated.hardware import GPUS, Precision
from serve.engines.simulated.known_models import MODELS
from serve.errors import ConfigError
from sim.deployment import Overrides
from sim.options import SimOptions
from sim.slo import Slo
from sim.workload_file import FORMATS

_SLO, _OPTIONS = Slo(), SimOptions()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `raytrt simulate`."""
    _add_workload(parser.add_argument_group("workload"))
    _add_fleet(parser.add_argument_group("fleet"))
    _add_policies(parser.add_argument_group("policies and limits"))
    _add_output(parser.add_argument_group("output"))


def _add_workload(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--trace",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="Mooncake JSONL, Azure CSV or the request log of all gateways, plain, .xz or .gz; or the .yaml "
        "description of a synthetic workload, as in configs/workloads",
    )
    group.add_argument("--format", choices=FORMATS, help="of the file, if it cannot be told from it")
    group.add_argument("--log-model", metavar="ID", help="whose requests of a request log are replayed")
    group.add_argument("--rate", type=_positive, default=1.0, metavar="X", help="requests arrive so many times as fast")
    group.add_argument("--limit", type=_count, metavar="N", help="only the first requests")
    group.add_argument(
        "--max-tokens", type=_count, metavar="N", help="output limit of requests without one; default: longest output"
    )
    group.add_argument("--seed", type=int, default=0, help="of everything drawn at random")


def _add_fleet(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--config", type=Path, metavar="FILE", help="take engine, replicas and policy from a config file"
    )
    group.add_argument("--config-model", metavar="ID", help="which model of it")
    group.add_argument("--replicas", metavar="N[,N...]", help="fleet sizes; default: as configured, else 1")
    group.add_argument("--model", choices=list(MODELS), help="default without --config: llama-3.1-8b")
    group.add_argument("--gpu", choices=list(GPUS), help="default without --config: h100")
    group.add_argument("--tensor-parallel", type=_count, metavar="N", help="GPUs of a replica")
    group.add_argument("--weights", choices=get_args(Precision), help="precision; default without --config: fp8")
    group.add_argument("--kv-cache", choices=get_args(Precision), help="precision; default without --config: fp8")
    group.add_argument(
        "--tokens-per-block", type=_count, metavar="N", help="of the KV cache; default: the trace's (Mooncake: 512)"
    )
    group.add_argument("--cache-blocks", type=_count, metavar="N", help="KV blocks of a replica; default: what fits")
    group.add_argument("--cache-fraction", type=_positive, metavar="X", help="... or so many times as many")
    group.add_argument("--max-batch-size", type=_count, metavar="N", help="sequences in a batch")
    group.add_argument("--max-num-tokens", type=_count, metavar="N", help="tokens computed in a step")
    group.add_argument("--gateways", type=_count, metavar="N", help="gateway processes; default: as configured, else 1")
    group.add_argument(
        "--delay-ms", type=_not_negative, default=_OPTIONS.delay_s * 1e3, metavar="X", help="network, one way"
    )
    group.add_argument(
        "--load-interval-ms",
        type=_positive,
        default=_OPTIONS.load_interval_s * 1e3,
        metavar="X",
        help="replicas tell of their load at most so often",
    )
    group.add_argument(
        "--no-queue",
        action="store_true",
        help="gateways send requests at once though all replicas are full, as with `fairness: {enabled: false}`",
    )


def _add_policies(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--policy",
        metavar="NAME[:KEY=VALUE...][,...]",
        help=f"{', '.join(POLICY_NAMES)}; or all. Default: the configured one, else predictive and round_robin",
    )
    group.add_argument("--slo", type=Path, metavar="FILE", help="limits, as in configs/slo")
    group.add_argument("--ttft-ms", type=_positive, metavar="X", help=f"limit; default {_SLO.ttft_ms:g}")
    group.add_argument("--tpot-ms", type=_positive, metavar="X", help=f"limit; default {_SLO.tpot_ms:g}")
    group.add_argument("--gpu-dollars-per-hour", type=_not_negative, metavar="X", help="price of one GPU")
    group.add_argument(
        "--recommend",
        action="store_true",
        help="choose policy and parameters: without --policy among all policies and variants of predictive",
    )


def _add_output(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    group.add_argument("--plot", type=Path, metavar="FILE", help="picture of the results: .png, .svg or .pdf")
    group.add_argument(
        "--jobs", type=_count, default=os.cpu_count() or 1, metavar="N", help="processes; default: one for each core"
    )


def overrides(arguments: argparse.Namespace, tokens_per_block: int | None = None) -> Overrides:
    """Return what the arguments say of the engines; `tokens_per_block`: what the workload has."""
    return Overrides(
        model=arguments.model,
        gpu=arguments.gpu,
        tensor_parallel=arguments.tensor_parallel,
        weights=arguments.weights,
        kv_cache=arguments.kv_cache,
        tokens_per_block=tokens_per_block or arguments.tokens_per_block,
        cache_blocks=arguments.cache_blocks,
        cache_fraction=arguments.cache_fraction,
        max_batch_size=arguments.max_batch_size,
        max_num_tokens=arguments.max_num_tokens,
    )


def positive_counts(name: str, text: str) -> list[int]:
    """Read numbers separated by commas.

    Raises:
        ConfigError: One is no positive number.
    """
    try:
        return [_count(part) for part in text.split(",")]
    except argparse.ArgumentTypeError as exc:
        raise ConfigError(f"{name}={text}: {exc}; write for instance 4,8,16") from None


def _count(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def _positive(text: str) -> float:
    value = _number(text)
    if value <= 0.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return value


def _not_negative(text: str) -> float:
    value = _number(text)
    if value < 0.0:
        raise argparse.ArgumentTypeError(f"{text!r} is below 0")
    return value


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no finite number")
    return value
