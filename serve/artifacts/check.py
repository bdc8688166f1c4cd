"""Whether a node may load a bundle: what the manifest requires against what the node has. Nothing is loaded for it."""

from collections.abc import Iterator

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from serve.artifacts.manifest import Requirements
from serve.artifacts.node_facts import GpuFacts, NodeFacts
from serve.errors import BundleCorrupt, BundleMismatch

# Cards of one model differ a little in what their driver reports, ECC and firmware take a share.
_MEMORY_SHARE = 0.98


def check_requirements(
    requires: Requirements, facts: NodeFacts, *, gpus: int | None = None, subject: str = "the bundle"
) -> None:
    """Check that a node has what a bundle requires.

    Args:
        requires: Of the bundle.
        facts: Of the process that will load it, in the environment that it will be loaded in.
        gpus: How many of the layout's GPUs are on this node; None: all.
        subject: What the message calls the bundle.

    Raises:
        BundleMismatch: Something is different; names every difference with both sides, and the remedy.
        BundleCorrupt: The requirements themselves make no sense.
    """
    mismatches = [
        *_machine(requires, facts),
        *_gpus(requires, facts, requires.gpus if gpus is None else gpus),
        *_driver(requires, facts),
        *_libraries(requires, facts),
    ]
    if mismatches:
        raise BundleMismatch(f"{subject} cannot be loaded here: {'; '.join(mismatches)}")


def _machine(requires: Requirements, facts: NodeFacts) -> Iterator[str]:
    if requires.machine is not None and requires.machine != facts.machine:
        yield (
            f"it was made for {requires.machine} processors, and this node has {facts.machine}; build it on such a "
            f"node, or let its replicas run on {requires.machine} nodes"
        )


def _gpus(requires: Requirements, facts: NodeFacts, needed: int) -> Iterator[str]:
    if needed == 0:
        return
    if len(facts.gpus) < needed:
        have = ", ".join(gpu.name for gpu in facts.gpus) or "none"
        yield (
            f"it takes {needed} GPUs of this node, and {len(facts.gpus)} may be used ({have}); give its ranks more, or "
            "build it for fewer"
        )
    different = {text: None for gpu in facts.gpus[:needed] for text in _gpu(requires, gpu)}  # once for equal GPUs
    yield from different


def _gpu(requires: Requirements, gpu: GpuFacts) -> Iterator[str]:
    remedy = "build it for this GPU, or set resources.accelerator_type so that its replicas find the other one"
    if requires.gpu_name is not None and gpu.name != requires.gpu_name:
        yield f"it was made for the GPU {requires.gpu_name!r}, and this node has {gpu.name!r}; {remedy}"
    capability = gpu.compute_capability
    if requires.compute_capability is not None and capability != requires.compute_capability:
        yield (
            f"it was made for compute capability {requires.compute_capability}, and {gpu.name} has {capability}; "
            f"{remedy}"
        )
    least = requires.min_compute_capability
    if least is not None and _version(capability, "GPU") < _version(least, "requires.min_compute_capability"):
        yield f"it needs compute capability {least} or newer, and {gpu.name} has {capability}; {remedy}"
    if gpu.memory_bytes < requires.gpu_memory_bytes * _MEMORY_SHARE:
        yield (
            f"it needs {_gib(requires.gpu_memory_bytes)} of memory on each GPU, and {gpu.name} has "
            f"{_gib(gpu.memory_bytes)}; build it for more GPUs, or with fewer bits"
        )


def _driver(requires: Requirements, facts: NodeFacts) -> Iterator[str]:
    if requires.min_driver is None:
        return
    if facts.driver is None:
        yield f"it needs NVIDIA's driver {requires.min_driver} or newer, and this node has none; install it"
    elif _version(facts.driver, "driver") < _version(requires.min_driver, "requires.min_driver"):
        yield (
            f"it needs NVIDIA's driver {requires.min_driver} or newer, and this node has {facts.driver}; update the "
            "driver, or build on a node with the older one"
        )


def _libraries(requires: Requirements, facts: NodeFacts) -> Iterator[str]:
    installed = {canonicalize_name(name): version for name, version in facts.libraries.items()}
    for name, wanted in requires.libraries.items():
        try:
            specifiers = SpecifierSet(wanted)
        except InvalidSpecifier:
            raise BundleCorrupt(f"requires.libraries.{name}: {wanted!r} is no version specifier (PEP 440)") from None
        version = installed.get(canonicalize_name(name))
        if version is None:
            yield (
                f"it needs {name} {wanted}, which is not installed in the engine's environment; install it, or name "
                "an engine_env that has it"
            )
        elif not specifiers.contains(_version(version, name), prereleases=True):
            yield (
                f"it needs {name} {wanted}, and {version} is installed; build it with that version, or name an "
                "engine_env that has the other one"
            )


def _version(text: str, of: str) -> Version:
    try:
        return Version(text)
    except InvalidVersion:
        raise BundleCorrupt(f"{of}: {text!r} is no version number") from None


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
