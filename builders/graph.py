"""The steps of a build: which there are, what each depends on, and which are still to be done. PURE.

A step's fingerprint covers what its output depends on, and no more: its code's version, the parts of the specification
that `spec_parts` names, the fingerprints of the steps it needs, user files by content, library versions and hardware.
That a step reads no other part is enforced: it is given a specification where these have their defaults
(`visible_spec`). The fingerprint of the last step is the bundle's.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from builders.context import StepName
from builders.resources import StepResources, step_resources, uses_trtllm
from builders.spec import BuildSpec
from builders.step_table import spec_part, spec_parts, step_needs
from serve.artifacts.fingerprint import fingerprint
from serve.artifacts.manifest import BundleKind
from serve.artifacts.node_facts import NodeFacts

# Distributions whose versions shape an output.
_LIBRARIES: Mapping[StepName, tuple[str, ...]] = {
    StepName.REFERENCE: ("tensorrt_llm", "torch", "transformers"),
    StepName.QUANTIZE: ("torch", "transformers", "nvidia-modelopt"),
    StepName.COMPILE: ("tensorrt_llm", "tensorrt", "torch", "transformers"),
    StepName.TUNE: ("tensorrt_llm", "torch", "transformers"),
    StepName.VERIFY: ("tensorrt_llm", "torch", "transformers"),
}
_TENSORRT = frozenset({"tensorrt_llm", "tensorrt"})
_READ_TEXTS = frozenset({StepName.REFERENCE, StepName.QUANTIZE, StepName.TUNE})
_HARDWARE = frozenset({StepName.COMPILE, StepName.TUNE, StepName.VERIFY})
_GIB = 2**30


@dataclass(frozen=True)
class BuildFacts:
    """What a build depends on besides its specification.

    Attributes:
        source: Digest of the checkpoint: fingerprint of its files' digests, or of what names them for ever.
        node: A node of the target, as our own Python sees it.
        engine_node: The same as the target's `engine_env` sees it; equal where there is none.
        code: Version of each step's code.
        texts: Digest of the texts that come with the package.
        user_files: BLAKE3 of the files that the specification names, as it names them.
    """

    source: str
    node: NodeFacts
    engine_node: NodeFacts
    code: Mapping[StepName, int]
    texts: str = ""
    user_files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StepNode:
    """One step of a build.

    Attributes:
        name: Which.
        fingerprint: Of its output.
        needs: Steps whose output it reads.
        resources: What it reserves.
        environment: Library versions and hardware that shape it.
    """

    name: StepName
    fingerprint: str
    needs: tuple[StepName, ...]
    resources: StepResources
    environment: Mapping[str, Any]


class StepState(StrEnum):
    """What is to be done about a step."""

    RUN = "run"
    CACHED = "cached"  # its output is in the store
    NOT_NEEDED = "not needed"  # all that needs it is there


@dataclass(frozen=True)
class BuildGraph:
    """The steps of one build, in an order in which they can run."""

    spec: BuildSpec
    steps: tuple[StepNode, ...]

    @property
    def fingerprint(self) -> str:
        """Of the bundle."""
        return self.steps[-1].fingerprint

    @property
    def label(self) -> str:
        """A short name, for logs and directories."""
        return f"{self.spec.name}-{self.fingerprint[:8]}"

    def node(self, name: StepName) -> StepNode:
        """Return one step."""
        return next(step for step in self.steps if step.name is name)

    def states(self, recorded: Collection[str], published: bool) -> Mapping[StepName, StepState]:
        """Decide what has to be done.

        Args:
            recorded: Fingerprints of the steps whose output is in the store.
            published: Whether the bundle is there.
        """
        needed = set() if published else {self.steps[-1].name}
        states: dict[StepName, StepState] = {}
        for step in reversed(self.steps):
            if step.name not in needed:
                done = step.fingerprint in recorded or (published and step is self.steps[-1])
                states[step.name] = StepState.CACHED if done else StepState.NOT_NEEDED
            elif step.fingerprint in recorded:
                states[step.name] = StepState.CACHED
            else:
                states[step.name] = StepState.RUN
                needed.update(step.needs)
        return {step.name: states[step.name] for step in self.steps}


def make_graph(spec: BuildSpec, facts: BuildFacts) -> BuildGraph:
    """Lay out the steps of a build.

    Raises:
        PlacementError, ConfigError: The engine's ranks cannot be started as the specification has it.
    """
    steps: dict[StepName, StepNode] = {}
    for name, needs in step_needs(spec).items():
        resources = step_resources(spec, name)
        environment = step_environment(spec, name, facts.engine_node if resources.engine_env else facts.node)
        covered = _covered(spec, facts, name, environment)
        covered["needs"] = {need.value: steps[need].fingerprint for need in needs}
        steps[name] = StepNode(name, fingerprint(covered), needs, resources, environment)
    return BuildGraph(spec, tuple(steps.values()))


def _covered(spec: BuildSpec, facts: BuildFacts, step: StepName, environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a step's fingerprint covers, besides the steps it needs."""
    full = spec.model_dump(mode="json")
    covered: dict[str, Any] = {
        "step": step.value,
        "code": facts.code[step],
        "spec": {part: _with_digests(spec_part(full, part), facts.user_files) for part in spec_parts(spec, step)},
    }
    if step is StepName.FETCH:
        covered["source"] = facts.source
    if step in _READ_TEXTS:
        covered["texts"] = facts.texts
    return covered | {"environment": environment}


def step_environment(spec: BuildSpec, step: StepName, node: NodeFacts) -> dict[str, Any]:
    """Return the library versions and the hardware that shape a step's output.

    Args:
        spec: The build.
        step: Which.
        node: As the step's process sees it, with all its GPUs.
    """
    environment: dict[str, Any] = {
        "libraries": {
            name: node.libraries[name]
            for name in _LIBRARIES.get(step, ())
            if name in node.libraries and (name not in _TENSORRT or uses_trtllm(spec, step))
        }
    }
    if step in _HARDWARE:
        environment["hardware"] = _hardware(spec, node)
    return environment


def _hardware(spec: BuildSpec, node: NodeFacts) -> dict[str, Any]:
    if spec.target.accelerator is None:
        return {"machine": node.machine}
    # Memory in whole GiB: drivers differ by a few MiB. A node's GPUs are taken to be alike, as Ray takes them.
    gpus = sorted({(gpu.name, gpu.compute_capability, round(gpu.memory_bytes / _GIB)) for gpu in node.gpus})
    covered: dict[str, Any] = {"machine": node.machine, "gpus": gpus}
    if spec.kind is BundleKind.TENSORRT_ENGINE:
        covered |= {"driver": node.driver, "cuda": node.cuda}
    return covered


def _with_digests(value: Any, user_files: Mapping[str, str]) -> Any:
    """Replace the names of the user's files by their digests: what they are called shapes nothing."""
    match value:
        case {"file": str(name), **rest}:
            return {**_with_digests(rest, user_files), "file": user_files.get(name, name)}
        case dict():
            return {key: _with_digests(item, user_files) for key, item in value.items()}
        case list():
            return [_with_digests(item, user_files) for item in value]
    return value
