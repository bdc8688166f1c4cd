"""parse_offers: the GPUs that a command line offers, or those of this machine."""

import math

from builders.plan.request import Offer
from serve.artifacts.node_facts import NodeFacts
from serve.artifacts.node_probe import probe_node
from serve.engines.simulated.hardware import CPU_CORE, GPUS, GpuDatasheet, gpu_named
from serve.errors import ConfigError

CPU = "cpu"


def parse_offers(text: str | None, dollars_per_hour: float | None, gpus_per_node: int | None) -> tuple[Offer, ...]:
    """Read `name[=price],...`; None: what this machine has.

    Raises:
        ConfigError: A GPU is not known, or a price is none.
    """
    if gpus_per_node is not None and gpus_per_node < 1:
        raise ConfigError(f"--gpus-per-node={gpus_per_node}: a node has one or more")
    if dollars_per_hour is not None and not 0.0 < dollars_per_hour < math.inf:
        raise ConfigError(
            f"--gpu-dollars-per-hour={dollars_per_hour:g} is no price in $ per hour; give for instance 2.5"
        )
    if text is None:
        return (_local_offer(probe_node(), dollars_per_hour, gpus_per_node),)
    offers = [_offer(part.strip(), dollars_per_hour, gpus_per_node) for part in text.split(",") if part.strip()]
    if not offers:
        raise ConfigError(f"--gpu={text!r} names no GPU; name one or more of {', '.join(GPUS)}, or cpu")
    if len({offer.gpu.generation == "cpu" for offer in offers}) > 1:
        raise ConfigError(f"--gpu={text!r}: a bundle for CPUs is another one than for GPUs; plan them one by one")
    return tuple({offer.key: offer for offer in offers}.values())


def _offer(text: str, dollars_per_hour: float | None, gpus_per_node: int | None) -> Offer:
    name, separator, price = text.partition("=")
    if separator:
        dollars_per_hour = _price(text, price)
    key, gpu = _datasheet(name)
    return Offer(key, gpu, dollars_per_hour, gpus_per_node or gpu.node_gpus)


def _datasheet(name: str) -> tuple[str, GpuDatasheet]:
    if name.lower() == CPU:
        return CPU, CPU_CORE
    key = gpu_named(name)
    if key is None:
        raise ConfigError(f"--gpu: {name!r} is not known; there are {', '.join(GPUS)}, and cpu")
    return key, GPUS[key]


def _price(text: str, price: str) -> float:
    try:
        dollars = float(price)
    except ValueError:
        dollars = -1.0
    if not 0.0 < dollars < float("inf"):
        raise ConfigError(f"--gpu: {price!r} in {text!r} is no price in $ per hour; write for instance h100=2.50")
    return dollars


def _local_offer(facts: NodeFacts, dollars_per_hour: float | None, gpus_per_node: int | None) -> Offer:
    if not facts.gpus:
        return Offer(CPU, CPU_CORE, dollars_per_hour, 1)
    found = facts.gpus[0]
    key = gpu_of_driver(found.name, found.memory_bytes)
    if key is None:
        raise ConfigError(
            f"--gpu: this machine's {found.name} is not among {', '.join(GPUS)}; name the one that is most like it"
        )
    return Offer(key, GPUS[key], dollars_per_hour, gpus_per_node or len(facts.gpus))


def gpu_of_driver(name: str, memory_bytes: float) -> str | None:
    """Return the key in `GPUS` of a GPU as the driver names it; None: none of them.

    Several have one name, or one that begins alike: the one whose memory is nearest is meant.
    """
    words = name.upper().replace("-", " ").split()
    candidates = [
        (abs(gpu.memory_bytes - memory_bytes) / gpu.memory_bytes, len(key), key)
        for key, gpu in GPUS.items()
        if set((gpu.accelerator_type or "").upper().split("-")) <= set(words)
    ]
    close = [candidate for candidate in candidates if candidate[0] < 0.1]
    if "PCIE" in words or "NVL" in words:
        kind = "pcie" if "PCIE" in words else "nvl"
        close = [candidate for candidate in close if candidate[2].endswith(kind)] or close
    return min(close)[2] if close else None
